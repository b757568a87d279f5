"""Set-up, API tokens and invitations, through the pages."""

import hashlib
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.accounts.invitations import find_invitation, grantable_roles, invite, join
from openpalm.feedback.accounts.setup_link import setup_token
from openpalm.feedback.models import ApiToken, Event, Invitation, Membership, Project, Role, User

PASSWORD = "a long enough password"
SIGN_UP = {"username": "zoe", "password1": PASSWORD, "password2": PASSWORD}


def test_setup_makes_the_administrator_and_leads_to_the_first_project(db, settings):
    token = setup_token(settings.FEEDBACK_DIR)
    client = Client()
    assert client.get("/").headers["Location"] == "/setup"
    assert client.get("/setup?token=guessed").status_code == 403
    assert client.post("/setup", SIGN_UP | {"token": "guessed"}).status_code == 403
    assert client.get(f"/setup?token={token}").status_code == 200
    response = client.post("/setup", SIGN_UP | {"token": token})
    assert response["Location"] == "/projects/new"
    page = client.get("/projects/new").content
    assert b"Your first project" in page
    form = {
        "name": "First",
        "slug": "first",
        "task": "pair",
        "scale": "5",
        "overlap": "2",
        "gold_share": "10",
        "repeat_share": "0",
        "blind": "on",
        "lease_minutes": "30",
        "guidelines": "Be *true*.",
    }
    assert client.post("/projects/new", form)["Location"] == "/p/first/"
    project = Project.objects.get()
    assert (project.gold_share, project.overlap, project.blind) == (0.1, 2, True)
    assert project.guideline is not None
    assert project.guideline.text == "Be *true*."
    assert Membership.objects.get().role == Role.OWNER
    assert Client().post("/setup", SIGN_UP | {"token": token, "username": "eve"}).status_code == 302
    assert User.objects.count() == 1, "the link works once"


def test_a_token_is_shown_once_and_only_its_hash_is_stored(admin, project, signed_in):
    client = signed_in(admin)
    form = {"name": "nightly", "scopes": ["responses:read"], "project": project.pk, "days": "30"}
    page = client.post("/account/tokens", form)
    assert page.status_code == 201
    secret = page.content.decode().split('<pre id="secret" tabindex="0">')[1].split("<")[0]
    token = ApiToken.objects.get()
    assert token.digest == hashlib.sha256(secret.encode()).hexdigest()
    assert token.expires_at - timezone.now() > timedelta(days=29)
    assert (token.scopes, token.project) == (["responses:read"], project)
    assert secret not in client.get("/account").content.decode()
    assert secret not in str(list(Event.objects.values()))
    call = {"headers": {"authorization": f"Bearer {secret}"}}
    assert Client().get("/api/v1/responses?project=demo", **call).status_code == 200
    client.post(f"/account/tokens/{token.pk}/revoke")
    assert Client().get("/api/v1/responses?project=demo", **call).status_code == 401


@pytest.mark.parametrize(
    "change", [{"scopes": []}, {"scopes": ["everything"]}, {"days": "9999"}, {"name": ""}]
)
def test_wrong_tokens_are_refused(admin, project, signed_in, change):
    form = {"name": "x", "scopes": ["items:read"], "days": "30"} | change
    assert signed_in(admin).post("/account/tokens", form).status_code == 422
    assert not ApiToken.objects.exists()


def test_a_token_cannot_be_limited_to_a_project_of_others(member, signed_in, project):
    stranger = User.objects.create_user("stranger", password=PASSWORD)
    form = {"name": "x", "scopes": ["items:read"], "days": "30", "project": project.pk}
    assert signed_in(stranger).post("/account/tokens", form).status_code == 422


def test_a_visitor_signs_up_by_invitation(project, admin):
    invitation, secret = invite(project, admin, Role.ANNOTATOR, days=7, uses=1)
    assert invitation.digest == hashlib.sha256(secret.encode()).hexdigest()
    client = Client()
    assert b"Join Demo" in client.get(f"/invite/{secret}").content
    assert client.post(f"/invite/{secret}", SIGN_UP)["Location"] == "/p/demo/label"
    membership = Membership.objects.get(project=project, user__username="zoe")
    assert membership.role == Role.ANNOTATOR
    assert not membership.user.is_superuser
    assert Client().get(f"/invite/{secret}").status_code == 404, "its one use is taken"
    again = Client().post(f"/invite/{secret}", SIGN_UP | {"username": "eve"})
    assert again.status_code == 404
    assert not User.objects.filter(username="eve").exists()


def test_the_form_of_an_invitation_gives_no_rights(project, admin):
    _, secret = invite(project, admin, Role.ANNOTATOR, days=7, uses=1)
    more = {"role": "owner", "is_superuser": "on", "is_staff": "on", "kind": "simulated"}
    Client().post(f"/invite/{secret}", SIGN_UP | more)
    user = User.objects.get(username="zoe")
    assert (user.is_superuser, user.is_staff, user.kind) == (False, False, User.Kind.PERSON)
    assert user.memberships.get().role == Role.ANNOTATOR


def test_a_member_keeps_the_role_and_takes_no_use(project, admin, member, signed_in):
    _, secret = invite(project, admin, Role.ANNOTATOR, days=7, uses=1)
    reviewer = member("rea", Role.REVIEWER)
    signed_in(reviewer).post(f"/invite/{secret}")
    assert reviewer.memberships.get().role == Role.REVIEWER
    assert find_invitation(secret) is not None


def test_the_last_use_goes_to_one_visitor(project, admin):
    invitation, _ = invite(project, admin, Role.ANNOTATOR, days=7, uses=1)
    first, second = (User.objects.create_user(name) for name in ("one", "two"))
    join(invitation, first)
    with pytest.raises(DataError, match="used up"):
        join(invitation, second)
    assert Membership.objects.filter(project=project).count() == 1


@pytest.mark.parametrize("change", ["revoked", "expired", "closed"])
def test_invitations_end(project, admin, change):
    _, secret = invite(project, admin, Role.ANNOTATOR, days=7, uses=5)
    if change == "closed":
        Project.objects.update(open=False)
    else:
        name = {"revoked": "revoked_at", "expired": "expires_at"}[change]
        Invitation.objects.update(**{name: timezone.now()})
    assert Client().post(f"/invite/{secret}", SIGN_UP).status_code == 404


def test_nobody_gives_a_role_above_their_own():
    assert grantable_roles(Role.ADMIN) == ["annotator", "reviewer", "admin"]
    assert grantable_roles(Role.OWNER) == list(Role.values)


def test_weak_passwords_are_refused(project, admin):
    _, secret = invite(project, admin, Role.ANNOTATOR, days=7, uses=1)
    for password in ("password", "12345678901", "zoe"):
        form = {"username": "zoe", "password1": password, "password2": password}
        answer = Client().post(f"/invite/{secret}", form)
        assert answer.status_code == 200
        assert list(answer.context["form"].errors) == ["password1"]
    assert not User.objects.filter(username="zoe").exists()
