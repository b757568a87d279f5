"""Every operation in every role, with every token: the operations come from the list of URLs."""

import re
from uuid import uuid4

import pytest
from django.db import transaction
from django.urls import URLPattern

from openpalm.feedback.accounts.access import RANKS
from openpalm.feedback.api.urls import urlpatterns
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.queue import next_assignment
from openpalm.feedback.models import (
    ApiToken,
    Comparison,
    Job,
    ModelVersion,
    Project,
    Promotion,
    Role,
    Snapshot,
    TrainRun,
    User,
)

SUPERUSER, STRANGER = "superuser", "stranger"
ROLES = (STRANGER, *Role.values, SUPERUSER)
OF_SITE = {("projects", "POST"), ("models", "POST")}
"""only an administrator of the site may"""
OPERATIONS = [
    (re.sub(r"<\w+:(\w+)>", r"{\1}", str(pattern.pattern)), method, one)
    for pattern in urlpatterns
    if isinstance(pattern, URLPattern)
    for method, one in getattr(pattern.callback, "operations", {}).items()
]


def objects_of(project, user, make_item):
    """For each parameter of a URL an object of this project, and of this user where it has one."""
    item = make_item(f"question of {user}", "yes", "no", in_project=project)
    flagged = next_assignment(project, user)
    assert flagged is not None
    flag = submission.flag(flagged.pk, user, "is wrong")
    make_item(f"another question of {user}", "yes", "no", in_project=project)
    assignment = next_assignment(project, user)
    assert assignment is not None
    model = ModelVersion.objects.create(project=project, name=f"model of {user}")
    of = {"project": project}
    return {
        "slug": project.slug,
        "item_id": item.pk,
        "prompt_id": item.prompt_id,
        "assignment_id": assignment.pk,
        "uid": flag.uid,
        "run_id": TrainRun.objects.create(verb="dpo", **of).pk,
        "model_id": model.pk,
        "snapshot_id": Snapshot.objects.create(digest=f"{user}", path="/none", **of).pk,
        "job_id": Job.objects.create(kind="statistics", **of).pk,
        "comparison_id": Comparison.objects.create(challenger=model, served=model, **of).pk,
        "promotion_id": Promotion.objects.create(model=model, by=user, **of).pk,
    }


@pytest.fixture
def users(admin, project, member):
    project.overlap = 20
    project.save()
    made = {role: member(f"an-{role}", role) for role in Role.values}
    return made | {SUPERUSER: admin, STRANGER: User.objects.create_user("stranger")}


LISTS = {path for path, _, _ in OPERATIONS if "{" not in path and path != "projects"}
"""their project is in the query or in the body"""


def ask(api, path, method, project="demo"):
    """The status and the error's message; what the request changed is rolled back."""
    given = {"project": project} if path in LISTS else {}
    with transaction.atomic():
        if method == "GET":
            response = api.get(path, **given)
        else:
            response = api.post(path, given) if method == "POST" else api.delete(path)
        said = ""
        if response.streaming:
            b"".join(response.streaming_content)
        else:
            said = response.data.get("error", {}).get("message", "")
        transaction.set_rollback(True)
    return response.status_code, said


def test_the_matrix_has_every_room():
    rooms = {path.partition("/")[0] for path, _, _ in OPERATIONS}
    assert {"projects", "items", "responses", "runs", "models", "prompts", "comparisons"} <= rooms
    assert len(OPERATIONS) > 40


@pytest.mark.parametrize("role", ROLES)
def test_each_role_does_what_it_may_and_nothing_else(role, users, caller, project, make_item):
    owner = users[SUPERUSER] if role == STRANGER else users[role]
    objects = objects_of(project, owner, make_item)
    for path, method, one in OPERATIONS:
        status, said = ask(caller(users[role], one.scope), path.format(**objects), method)
        if role == STRANGER:
            may = (path, method) == ("projects", "GET")
        else:
            may = role == SUPERUSER or RANKS[role] >= RANKS[one.least]
        may = may and (role == SUPERUSER or (path, method) not in OF_SITE)
        refused = status in (401, 403, 404, 405)
        assert status < 500, f"{method} {path} as {role}: {status}"
        assert refused != may, f"{method} {path} as {role}: {status} {said}"


def test_no_operation_works_without_its_scope(users, caller, project, make_item):
    objects = objects_of(project, users[SUPERUSER], make_item)
    for path, method, one in OPERATIONS:
        others = [scope for scope in ApiToken.SCOPES if scope != one.scope]
        status, said = ask(caller(users[SUPERUSER], *others), path.format(**objects), method)
        assert (status, one.scope in said) == (403, True), f"{method} {path}: {status} {said}"


def test_a_token_of_one_project_is_refused_in_another(users, caller, project, make_item):
    other = Project.objects.create(slug="other", name="Other", overlap=20)
    objects = objects_of(other, users[SUPERUSER], make_item)
    limited = caller(users[SUPERUSER], project=project)
    for path, method, _ in OPERATIONS:
        if (path, method) == ("projects", "GET"):
            continue
        status, said = ask(limited, path.format(**objects), method, project="other")
        assert (status, "limited" in said) == (403, True), f"{method} {path}: {status} {said}"


def test_objects_of_another_project_do_not_exist(users, caller, make_item):
    other = Project.objects.create(slug="other", name="Other", overlap=20)
    theirs = objects_of(other, users[SUPERUSER], make_item)
    nobodys = dict.fromkeys(theirs, 987654321) | {"slug": "none", "uid": uuid4()}
    api = caller(users[Role.OWNER])
    tried = 0
    for path, method, _ in OPERATIONS:
        if "{" in path:
            hidden = ask(api, path.format(**theirs), method)
            missing = ask(api, path.format(**nobodys), method)
            assert hidden == missing, f"{method} {path}: {hidden} {missing}"
            assert hidden[0] == 404, f"{method} {path}: {hidden}"
            tried += 1
    assert tried > 25
