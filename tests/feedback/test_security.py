"""Attacks on the site as a whole: headers, cookies, hosts, forms, bodies, redirects, deployment.

docs/feedback-security.md lists what is tried here and what happens.
"""

import os
import subprocess
import sys

import pytest
from django.conf import settings as django_settings
from django.test import Client
from django.urls import get_resolver, reverse

from openpalm.feedback.accounts import middleware
from openpalm.feedback.accounts.invitations import invite
from openpalm.feedback.models import Item, Membership, Project, Role, User

PASSWORD = "a long enough password"


@pytest.fixture
def visitor(admin):
    """A client that checks CSRF tokens, as browsers meet it."""
    return Client(enforce_csrf_checks=True)


def views(patterns, prefix=""):
    for each in patterns:
        route = prefix + str(each.pattern)
        if hasattr(each, "url_patterns"):
            yield from views(each.url_patterns, route)
        else:
            yield route, each.callback


def test_only_the_api_is_exempt_from_the_csrf_check():
    exempt = {
        route
        for route, view in views(get_resolver().url_patterns)
        if getattr(view, "csrf_exempt", False)
    }
    assert exempt, "the API takes tokens instead of cookies"
    assert all(route.startswith("api/v1/") for route in exempt), exempt


def test_a_post_without_csrf_token_changes_nothing(visitor, project, admin):
    visitor.force_login(admin)
    forms = {
        "settings": {"name": "taken"},
        "close": {"slug": "demo"},
        "invitation-new": {"role": "owner", "days": 7, "uses": 1},
        "typed": {"text": "hello"},
    }
    for name, form in forms.items():
        response = visitor.post(reverse(name, args=["demo"]), form)
        assert response.status_code == 403
        assert b"out of date" in response.content
        assert response.headers["Content-Security-Policy"] == middleware.POLICY
    assert visitor.post("/account/tokens", {"name": "x"}).status_code == 403
    project.refresh_from_db()
    assert project.name == "Demo"
    assert project.open


def test_every_answer_has_the_policy_and_is_not_cached(visitor, project, signed_in, admin):
    for client in (visitor, signed_in(admin)):
        for path in ("/", "/login", "/p/demo/", "/nope", "/healthz", "/p/demo/settings"):
            response = client.get(path)
            assert response.headers["Content-Security-Policy"] == middleware.POLICY, path
            assert "no-store" in response.headers["Cache-Control"], path
            assert response.headers["X-Frame-Options"] == "DENY", path
            assert response.headers["X-Content-Type-Options"] == "nosniff", path
            assert response.headers["Referrer-Policy"] == "same-origin", path
    assert "unsafe" not in middleware.POLICY


def test_pages_hold_no_inline_script_or_style(project, signed_in, admin):
    client = signed_in(admin)
    for name in (
        "project",
        "settings",
        "members",
        "prompts",
        "items",
        "responses",
        "jobs",
        "export",
    ):
        page = client.get(reverse(name, args=["demo"])).content.decode()
        assert "style=" not in page, name
        assert "<style" not in page, name
        assert "onclick" not in page, name
        assert page.count("<script") == page.count("<script src="), name


def test_cookies_are_out_of_reach_of_scripts_and_other_sites(visitor, admin):
    form = visitor.get("/login")
    token = form.cookies["openpalm_csrf"].value
    given = {"username": "root", "password": PASSWORD, "csrfmiddlewaretoken": token}
    session = visitor.post("/login", given).cookies["openpalm_session"]
    assert session["httponly"]
    assert session["samesite"] == "Lax"
    assert form.cookies["openpalm_csrf"]["samesite"] == "Lax"


def test_signing_in_changes_the_session(admin):
    client = Client()
    client.session.save()
    session = client.session
    session["planted"] = "by an attacker"
    session.save()
    client.cookies["openpalm_session"] = session.session_key
    client.post("/login", {"username": "root", "password": PASSWORD})
    assert client.session.session_key != session.session_key
    assert client.get("/account").status_code == 200
    old = Client()
    old.cookies["openpalm_session"] = session.session_key
    assert old.get("/account").status_code == 302


def test_a_password_change_signs_other_browsers_out(admin, signed_in):
    mine, other = signed_in(admin), signed_in(admin)
    new = "another quite long password"
    form = {"old_password": PASSWORD, "new_password1": new, "new_password2": new}
    assert mine.post("/account/password", form).status_code == 302
    assert mine.get("/account").status_code == 200
    assert other.get("/account").status_code == 302


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "https:evil.example",
        "javascript:alert(1)",
        "\thttps://evil.example",
    ],
)
def test_sign_in_leads_to_no_other_site(admin, target):
    client = Client()
    form = {"username": "root", "password": PASSWORD, "next": target}
    assert client.post("/login", form)["Location"] == "/"


def test_sign_in_leads_back_to_the_page(admin, project):
    client = Client()
    location = client.get("/p/demo/settings")["Location"]
    assert location == "/login?next=/p/demo/settings"
    form = {"username": "root", "password": PASSWORD, "next": "/p/demo/settings"}
    assert client.post("/login", form)["Location"] == "/p/demo/settings"


def test_unknown_hosts_are_refused(admin):
    response = Client().get("/login", headers={"host": "evil.example"})
    assert response.status_code == 400
    assert b"evil" not in response.content


def test_an_invitation_link_names_the_host_of_the_request_only(project, admin, signed_in):
    client = signed_in(admin)
    form = {"role": "annotator", "days": 7, "uses": 1}
    forged = client.post("/p/demo/invitations", form, headers={"x-forwarded-host": "evil.example"})
    assert b"http://testserver/invite/" in forged.content
    assert b"evil" not in forged.content


def test_large_bodies_are_refused_unread(settings, admin, project, signed_in, member):
    class Unread:
        def read(self, *_):
            raise AssertionError("the body was read")

        readline = read

    settings.FEEDBACK_MAX_UPLOAD_BYTES = 5 * 2**20
    size = 4 * 2**20
    extra = {"CONTENT_LENGTH": str(size), "wsgi.input": Unread()}
    kind = "multipart/form-data; boundary=x"
    for client, path in (
        (Client(), "/login"),
        (Client(), "/p/demo/prompts/upload"),
        (signed_in(member("ann")), "/p/demo/prompts/typed"),
        (signed_in(admin), "/p/demo/settings"),
    ):
        response = client.post(path, b"", kind, **extra)
        assert response.status_code == 413, path
    over = {"CONTENT_LENGTH": str(6 * 2**20), "wsgi.input": Unread()}
    assert signed_in(admin).post("/p/demo/prompts/upload", b"", kind, **over).status_code == 413


def test_many_fields_and_damaged_multipart_give_400(admin, signed_in, project):
    client = signed_in(admin)
    many = {f"field{n}": "x" for n in range(1100)}
    assert client.post("/p/demo/prompts/typed", many).status_code == 400
    broken = client.post("/p/demo/prompts/upload", b"--x\r\n", "multipart/form-data; boundary=")
    assert broken.status_code in (400, 422)


def test_nul_bytes_and_huge_numbers_in_addresses_and_forms(admin, signed_in, project):
    client = signed_in(admin)
    huge = "9" * 5000  # more digits than `int` reads
    for path in (
        f"/p/demo/items?before={huge}",
        f"/p/demo/items?after=-1&state={huge}",
        "/p/demo/items?who=%00",
        "/p/demo/responses?who=a%00b&kind=%00",
        "/p/demo/audit?area=%00&who=%00",
        f"/p/demo/mine?before={huge}",
        f"/p/demo/guidelines?version={huge}",
        *(f"/p/demo/guidelines/versions?version={n}" for n in ("9" * 8, "9" * 18, huge, "²")),
        "/p/demo/export/download?format=records&since=2026-99-99",
        "/p/demo/export/download?format=records&who=%00",
    ):
        assert client.get(path).status_code in (200, 404, 422), path
    for path in (f"/p/demo/items/{huge}", f"/p/demo/items/{2**63}"):
        assert client.get(path).status_code == 404, path
    assert client.post("/login", {"username": "a\0b", "password": "x\0"}).status_code == 400


def test_an_error_of_the_server_shows_no_detail(admin, signed_in, project, monkeypatch):
    def fail(*_):
        raise RuntimeError("the secret of the server")

    monkeypatch.setattr("openpalm.feedback.manage.overview.item_counts", fail)
    client = signed_in(admin)
    client.raise_request_exception = False
    response = client.get("/p/demo/")
    assert response.status_code == 500
    assert b"secret" not in response.content
    assert response.headers["Content-Security-Policy"] == middleware.POLICY


def test_the_tables_of_django_admin(admin, signed_in, member, project):
    for path in ("/admin/", "/admin/feedback/event/", "/admin/feedback/apitoken/"):
        assert signed_in(member("ann", Role.OWNER)).get(path).status_code == 302
        assert signed_in(admin).get(path).status_code == 200
    login = Client().get("/admin/login/?next=/admin/")
    assert login["Location"] == "/login?next=/admin/", "the throttled page is the only one"
    invitation, _ = invite(project, admin, Role.ANNOTATOR, days=1, uses=1)
    page = signed_in(admin).get(f"/admin/feedback/invitation/{invitation.pk}/change/")
    assert invitation.digest.encode() not in page.content
    user = signed_in(admin).get(f"/admin/feedback/user/{admin.pk}/change/")
    assert admin.password.encode() not in user.content
    event = project.events.order_by("id").first()
    for action in ("change", "delete"):
        path = f"/admin/feedback/event/{event.pk}/{action}/"
        assert signed_in(admin).post(path, {"action": "forged"}).status_code == 403
    event.refresh_from_db()
    assert event.action == "invitation.made"
    assert signed_in(admin).post("/admin/feedback/response/add/").status_code == 403


def test_djangos_deploy_check_is_clean(tmp_path):
    environment = os.environ | {
        "OPENPALM_FEEDBACK_DIR": str(tmp_path),
        "OPENPALM_FEEDBACK_HTTPS": "1",
        "OPENPALM_FEEDBACK_HOSTS": "feedback.example.org",
    }
    code = (
        "from openpalm.feedback.manage_command import manage;"
        "manage(['check', '--deploy', '--fail-level', 'WARNING'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout


def test_cookies_are_for_https_only_behind_a_proxy(tmp_path):
    environment = os.environ | {
        "OPENPALM_FEEDBACK_DIR": str(tmp_path),
        "OPENPALM_FEEDBACK_HTTPS": "1",
        "DJANGO_SETTINGS_MODULE": "openpalm.feedback.settings",
    }
    code = (
        "from django.conf import settings as s;"
        "print(s.SESSION_COOKIE_SECURE, s.CSRF_COOKIE_SECURE, s.SECURE_SSL_REDIRECT, s.DEBUG)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True", "True", "False"]


def test_the_secret_key_is_readable_by_its_owner_only():
    assert (django_settings.FEEDBACK_DIR / "secret_key").stat().st_mode & 0o077 == 0


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "{{ 7|add:7 }}{% debug %}",
    "</textarea><script>alert(1)</script>",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_people_and_models_are_shown_as_text(text, admin, signed_in, make_item):
    project = Project.objects.create(slug="hostile", name=text[:120])
    Membership.objects.create(project=project, user=admin, role=Role.OWNER)
    project.guidelines.create(version=1, text=text, author=admin)
    item: Item = make_item(text, text, f"{text} 2", in_project=project)
    client = signed_in(admin)
    client.post(
        f"/p/hostile/items/{item.pk}/change", {"action": "priority", "priority": text}, follow=True
    )
    user = User.objects.create(username=text[:150])
    Membership.objects.create(project=project, user=user, role=Role.ANNOTATOR)
    project.events.create(user=user, action=text[:64], target=text, data={text: [text]})
    project.jobs.create(kind="import", message=text, arguments={"name": text}, created_by=user)
    invite(project, user, Role.ANNOTATOR, days=1, uses=1)
    assignment = item.assignments.create(
        user=user,
        project=project,
        order=[0, 1],
        state="flagged",
        leased_at="2026-01-01T00:00Z",
        expires_at="2026-01-01T00:00Z",
        counted=False,
    )
    item.responses.create(
        project=project,
        user=user,
        assignment=assignment,
        author_kind="person",
        state="flagged",
        kind="flag",
        payload={"candidate": None, "reason": text},
        reason=text,
    )
    pages = (
        "",
        "label",
        "items",
        f"items/{item.pk}",
        "responses",
        "flags",
        "jobs",
        "members",
        "audit",
        "prompts",
        "guidelines/versions",
        "guidelines/edit",
        "settings",
        "guidelines",
    )
    shown = 0
    for path in ("/", "/account", *(f"/p/hostile/{page}" for page in pages)):
        page = client.get(path).content.decode()
        assert "<script>alert" not in page, path
        assert "<img src=x" not in page, path
        assert "<svg" not in page, path
        shown += text.split(">")[0].lstrip("<\"'") in page
    assert shown > 8, "the texts were not on the pages"
