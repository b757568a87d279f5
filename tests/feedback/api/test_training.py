"""Training runs and promotion over the API: the same rules as on the pages."""

import pytest

from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Job, ModelVersion, Promotion, Role, TrainRun


@pytest.fixture
def base(project):
    return ModelVersion.objects.create(project=project, name="base", path="runs/base")


@pytest.fixture
def boss(member, caller):
    return caller(member("boss", Role.ADMIN))


def start(api, **changes):
    return api.post("runs", {"project": "demo", "verb": "dpo", "parent": "base"} | changes)


def test_a_training_is_queued(project, base, boss, member, make_item):
    make_item("one", "yes", "no")
    assignment = queue.next_assignment(project, member("ann"))
    better = Judgement("compare", {"better": 0, "worse": 1, "strength": 1})
    submission.submit(assignment.pk, member("ann"), better)
    response = start(boss, settings={"epochs": 3})
    assert response.status_code == 201, response.data
    run = TrainRun.objects.get()
    assert (run.verb, run.parent, run.settings["epochs"]) == ("dpo", base, 3)
    assert Job.objects.get().arguments == {"run": run.pk}
    assert boss.get(f"runs/{run.pk}").data["state"] == "queued"
    assert [one["id"] for one in boss.get("runs", project="demo").data["data"]] == [run.pk]
    assert boss.post(f"runs/{run.pk}/stop").data["state"] == "stopped"
    assert boss.post(f"runs/{run.pk}/stop").status_code == 409


@pytest.mark.parametrize(
    ("changes", "held_back"),
    [
        ({"verb": "reward"}, True),
        ({"verb": "reward", "hold_back": False}, False),
        ({"verb": "dpo"}, False),
        ({"verb": "dpo", "hold_back": True}, True),
    ],
)
def test_a_reward_model_is_not_trained_on_the_random_arm_unless_asked(
    project, base, boss, member, make_item, changes, held_back
):
    make_item("one", "yes", "no")
    assignment = queue.next_assignment(project, member("ann"))
    better = Judgement("compare", {"better": 0, "worse": 1, "strength": 1})
    submission.submit(assignment.pk, member("ann"), better)
    assert start(boss, **changes).status_code == 201
    assert TrainRun.objects.get().settings["filter"]["hold_back"] is held_back


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"verb": "rm"}, "verb"),
        ({"hold_back": "yes"}, "hold_back"),
        ({"parent": "other"}, "parent"),
        ({"reward_model": 3}, "reward_model"),
        ({"settings": {"filter": {}}}, "settings.filter"),
        ({"settings": {"out": "/etc"}}, None),
        ({"settings": {"epochs": "1; rm"}}, None),
        ({"author_kinds": ["robot"]}, None),
        ({}, None),
    ],
)
def test_a_training_that_cannot_run_is_refused(base, boss, changes, field):
    response = start(boss, **changes)
    assert (response.status_code, response.data["error"]["field"]) == (400, field)
    assert not TrainRun.objects.exists()


def test_roles_and_scopes_are_needed(base, member, caller):
    assert start(caller(member("rev", Role.REVIEWER))).status_code == 403
    assert start(caller(member("boss", Role.ADMIN), "runs:read")).status_code == 403


def test_a_model_without_a_comparison_is_not_promoted(base, boss):
    assert boss.get("models", project="demo").data["data"][0]["name"] == "base"
    assert boss.get(f"models/{base.pk}").data["served"] is False
    assert boss.post(f"models/{base.pk}/promote").status_code == 409
    wrong = boss.post(f"models/{base.pk}/promote", {"comparison": 7})
    assert wrong.data["error"]["field"] == "comparison"
    assert not Promotion.objects.exists()
