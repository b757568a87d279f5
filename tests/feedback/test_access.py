"""Every URL of the site in every role: the URLs come from the resolver, the rights from `.access`.

A view without `.access`, or a URL with a parameter that `objects_of` does not know, fails the test:
a new page cannot be forgotten.
"""

from datetime import timedelta

import pytest
from django.db import transaction
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from openpalm.feedback.accounts.access import PUBLIC, RANKS, SIGNED_IN, SITE_ADMIN
from openpalm.feedback.accounts.invitations import invite
from openpalm.feedback.accounts.tokens import issue
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.queue import next_assignment
from openpalm.feedback.models import (
    ApiToken,
    Comparison,
    Conversation,
    Invitation,
    Job,
    Membership,
    ModelVersion,
    Project,
    Promotion,
    Role,
    Snapshot,
    Task,
    TrainRun,
    User,
)

SUPERUSER, STRANGER, ANONYMOUS = "superuser", "stranger", "anonymous"
METHODS = ("GET", "POST")
ROLES = (ANONYMOUS, STRANGER, *Role.values, SUPERUSER)


def walk(patterns, prefix="", namespace=""):
    """(route, pattern, namespace) of every URL."""
    for each in patterns:
        route = prefix + str(each.pattern)
        if isinstance(each, URLResolver):
            yield from walk(each.url_patterns, route, each.namespace or namespace)
        else:
            yield route, each, namespace


URLS: list[tuple[str, URLPattern, str]] = list(walk(get_resolver().url_patterns))


def access_of(pattern, namespace):
    # Django's own site of tables is closed to all but superusers by Site.has_permission.
    return SITE_ADMIN if namespace == "admin" else getattr(pattern.callback, "access", None)


def objects_of(project: Project, user: User, make_item) -> dict[str, object]:
    """For each parameter of a URL an object of this project, and of this user where it has one."""
    resident, _ = User.objects.get_or_create(username=f"resident of {project.slug}")
    membership, _ = Membership.objects.get_or_create(
        project=project, user=resident, role=Role.ANNOTATOR
    )
    item = make_item(f"question of {user}", "yes", "no", in_project=project)
    flagged = next_assignment(project, user)
    assert flagged is not None
    flag = submission.flag(flagged.pk, user, "is wrong")
    make_item(f"another question of {user}", "yes", "no", in_project=project)
    assignment = next_assignment(project, user)
    assert assignment is not None
    issue(user, "token", ["items:read"], project=project)
    invite(project, user, Role.ANNOTATOR, days=1, uses=1)
    model = ModelVersion.objects.create(project=project, name=f"model of {user}")
    run = TrainRun.objects.create(project=project, verb="dpo", created_by=user)
    comparison = Comparison.objects.create(project=project, challenger=model, served=model)
    return {
        "slug": project.slug,
        "item_id": item.pk,
        "prompt_id": make_item(f"third question of {user}", in_project=project).prompt_id,
        "assignment_id": assignment.pk,
        "response_id": flag.pk,
        "uid": flag.uid,
        "member_id": membership.pk,
        "invitation_id": Invitation.objects.filter(project=project).order_by("-id")[0].pk,
        "token_id": ApiToken.objects.filter(user=user).order_by("-id")[0].pk,
        "job_id": Job.objects.create(project=project, kind="statistics").pk,
        "model_id": model.pk,
        "run_id": run.pk,
        "comparison_id": comparison.pk,
        "promotion_id": Promotion.objects.create(project=project, model=model, by=user).pk,
        "snapshot_id": Snapshot.objects.create(
            project=project, digest=f"of {user}", path="/none", created_by=user
        ).pk,
        "conversation_id": Conversation.objects.create(
            project=project, user=user, model_ids=[model.pk, model.pk]
        ).pk,
        "secret": "no-such-invitation",
        "user_id": resident.pk,
        # Django's own site of tables.
        "object_id": user.pk,
        "app_label": "feedback",
        "content_type_id": 1,
        "url": "none",
    }


@pytest.fixture
def users(admin, project, member):
    """A user of each role, and None for the anonymous visitor."""
    project.overlap = 20
    project.save()
    Membership.objects.create(project=project, user=admin, role=Role.OWNER)
    made: dict[str, User | None] = {role: member(f"an-{role}", role) for role in Role.values}
    stranger = User.objects.create_user("stranger", password="a long enough password")
    return made | {SUPERUSER: admin, STRANGER: stranger, ANONYMOUS: None}


@pytest.fixture
def clients(users, signed_in):
    return {name: signed_in(user) if user else Client() for name, user in users.items()}


def address(route, objects):
    """The URL with these objects."""
    kinds = converters(route)
    unknown = set(kinds) - set(objects)
    assert not unknown, f"{route}: add an object for {unknown} to objects_of"
    path = route
    for name, kind in kinds.items():
        path = path.replace(f"<{kind}:{name}>", str(objects[name]))
    return "/" + path.replace("^", "").replace("$", "").replace("\\Z", "")


def converters(route):
    """{parameter: converter} of a route such as p/<slug:slug>/items/<int:item_id>."""
    parts = [part.partition(">")[0] for part in route.split("<")[1:]]
    return {part.rpartition(":")[2]: part.partition(":")[0] for part in parts if ":" in part}


def request(client, method, path):
    """The response; what the request changed is rolled back, and so are the cookies."""
    if "(?P" in path:  # Django's own regular expressions
        return None
    cookies = client.cookies.output(header="")
    with transaction.atomic():
        if path.startswith("/p/demo/chat"):  # pages of one task only
            Project.objects.filter(slug="demo").update(task=Task.CHAT)
        response = client.generic(method, path, b"", "application/x-www-form-urlencoded")
        if response.streaming:
            b"".join(response.streaming_content)
        transaction.set_rollback(True)
    client.cookies.load(cookies)
    return response


def may(role, access):
    """Whether the role has the right."""
    if access == PUBLIC or role == SUPERUSER:
        return not access.startswith("api:")
    if access == SIGNED_IN:
        return role != ANONYMOUS
    return access in RANKS and role in RANKS and RANKS[role] >= RANKS[access]


def is_refused(response):
    to_sign_in = response.status_code == 302 and response["Location"].startswith(
        ("/login", "/admin/")
    )
    return to_sign_in or response.status_code in (401, 403, 404, 405)


def test_every_view_says_who_may_open_it():
    known = {PUBLIC, SIGNED_IN, SITE_ADMIN, *Role.values}
    for route, pattern, namespace in URLS:
        access = access_of(pattern, namespace)
        is_known = access in known or str(access).startswith("api:")
        assert is_known, f"{route}: its view has no .access; decorate it (accounts/access.py)"


@pytest.mark.parametrize("role", ROLES)
def test_each_role_opens_what_it_may_and_nothing_else(role, users, clients, project, make_item):
    owner = users[role] or users[Role.OWNER]
    as_whom = users[SUPERUSER] if role == STRANGER else owner
    objects = objects_of(project, as_whom, make_item)
    if role == STRANGER:  # their own token is theirs wherever they belong
        objects["token_id"] = _token_of(owner)
    opened = 0
    for route, pattern, namespace in URLS:
        access = access_of(pattern, namespace)
        path = address(route, objects)
        for method in ("GET",) if namespace == "admin" and role == SUPERUSER else METHODS:
            response = request(clients[role], method, path)
            if response is None:
                continue
            status = response.status_code
            assert status < 500, f"{method} {path} as {role}: {status}"
            if not may(role, access):
                assert is_refused(response), f"{method} {path} is open to {role}: {status}"
            elif namespace != "admin" and access != PUBLIC:
                is_open = not is_refused(response) or status == 405
                assert is_open, f"{method} {path} is closed to {role}: {status}"
                opened += status != 405
    expected = {ANONYMOUS: 0, STRANGER: 3}.get(role, 10)
    assert opened >= expected, "the test opened too few pages to mean anything"


def _token_of(user):
    issue(user, "own", ["items:read"])
    return ApiToken.objects.get(user=user).pk


def test_objects_of_another_project_are_not_found(users, clients, make_item):
    other = Project.objects.create(slug="other", name="Other", overlap=20)
    theirs = objects_of(other, users[SUPERUSER], make_item)
    mine = {"slug": "demo"}
    tried = 0
    for route, _, namespace in URLS:
        given = set(converters(route))
        if namespace == "admin" or "slug" not in given or given == {"slug"}:
            continue
        path = address(route, theirs | mine)
        for method in METHODS:
            for role in (Role.OWNER, SUPERUSER):
                response = request(clients[role], method, path)
                assert response is not None
                # The address of a form, opened by hand, leads to the page of the form.
                to_form = method == "GET" and response.headers.get("Location") == "/p/demo/label"
                refused = response.status_code in (401, 404, 405) or to_form
                assert refused, f"{method} {path} as {role}: {response.status_code}"
                tried += response.status_code == 404
    assert tried > 20


def test_a_member_of_one_project_opens_no_page_of_another(users, clients, make_item):
    other = Project.objects.create(slug="other", name="Other", overlap=20)
    theirs = objects_of(other, users[SUPERUSER], make_item)
    for route, pattern, namespace in URLS:
        if namespace == "admin" or "slug" not in converters(route):
            continue
        path = address(route, theirs)
        response = request(clients[Role.OWNER], "GET", path)
        assert response is not None
        # A page of the site's administrators refuses before it looks for the project.
        refused = 403 if pattern.callback.access == SITE_ADMIN else 404
        assert response.status_code in (401, refused, 405), f"{path}: {response.status_code}"


def test_expired_and_used_invitations_are_not_found(project, admin, clients, users):
    invitation, secret = invite(project, admin, Role.ANNOTATOR, days=1, uses=1)
    assert clients[STRANGER].get(f"/invite/{secret}").status_code == 200
    invitation.expires_at = timezone.now() - timedelta(seconds=1)
    invitation.save()
    assert clients[STRANGER].get(f"/invite/{secret}").status_code == 404
