"""An item judged over the API is the same as one judged on the page."""

import json
import re
from pathlib import Path

import pytest
from django.db import OperationalError

from openpalm.data.rows.preferences import Preference
from openpalm.feedback.models import Assignment, ModelVersion, Project, Response, Role, User


@pytest.fixture
def ann(member, caller):
    return caller(member("ann"))


def lease(api):
    return api.post("projects/demo/next").data["assignment"]


def test_the_next_item_is_blind_and_in_the_order_shown(project, make_item, ann, settings):
    item = make_item("2 + 2?", "four", "five")
    model = ModelVersion.objects.create(project=project, name="secret-model")
    item.places.first().candidate.__class__.objects.update(model=model, checkpoint="secret-hash")
    response = ann.post("projects/demo/next")
    assert b"secret" not in response.content
    shown = response.data["assignment"]
    order = Assignment.objects.get().order
    assert [c["text"] for c in shown["candidates"]] == [("four", "five")[i] for i in order]
    assert shown["messages"] == [{"role": "user", "content": "2 + 2?"}]
    project.blind = False
    project.save()
    assert lease(ann)["candidates"][0]["model"] == "secret-model"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_payload_is_renumbered_from_the_screen_to_the_item(project, make_item, ann, order):
    make_item("one", "yes", "no")
    shown = lease(ann)
    Assignment.objects.update(order=order)
    payload = {"better": 0, "worse": 1, "strength": 2}
    body = {"payload": payload, "elapsed_ms": 1200}
    answer = ann.post(f"assignments/{shown['id']}/submit", body)
    assert answer.data["response"]["counted"] is True
    stored = Response.objects.get()
    assert stored.payload == {"better": order[0], "worse": order[1], "strength": 2}
    assert (stored.picked_place, stored.elapsed_ms, stored.guideline_version) == (0, 1200, 1)


def test_the_judgement_in_the_docs_is_taken(project, make_item, ann):
    make_item("one", "yes", "no")
    docs = Path(__file__).parents[3] / "docs" / "feedback-api.md"
    (body,) = re.findall(r"/submit -d '(.*)'", docs.read_text(encoding="utf-8"))
    answer = ann.post(f"assignments/{lease(ann)['id']}/submit", json.loads(body))
    assert answer.data["response"]["counted"] is True


def test_a_full_disk_is_no_bug(project, make_item, ann, monkeypatch):
    def submit(*_):
        raise OperationalError("database or disk is full")

    make_item("one", "yes", "no")
    shown = lease(ann)
    monkeypatch.setattr("openpalm.feedback.judgements.submission.submit", submit)
    answer = ann.post(f"assignments/{shown['id']}/submit", {"payload": {"tie": [0, 1]}})
    assert answer.status_code == 503
    assert answer.data["error"]["code"] == "unavailable"
    assert "disk of this site is full: nothing was stored" in answer.data["error"]["message"]


def test_a_repeated_submission_returns_the_first_response(project, make_item, ann):
    make_item("one", "yes", "no")
    shown = lease(ann)
    body = {"payload": {"tie": [1, 0]}}
    ids = {ann.post(f"assignments/{shown['id']}/submit", body).data["response"]["id"] for _ in "ab"}
    assert ids == {str(Response.objects.get().uid)}
    assert Response.objects.get().payload == {"tie": [0, 1]}


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"better": 0, "worse": 0, "strength": 1},
        {"better": 0, "worse": 2, "strength": 1},
        {"better": 0, "worse": 1, "strength": 3},
        {"tie": [0]},
        {"up": True, "candidate": 0},
        [],
    ],
)
def test_a_payload_that_does_not_fit_is_refused(project, make_item, ann, payload):
    make_item("one", "yes", "no")
    answer = ann.post(f"assignments/{lease(ann)['id']}/submit", {"payload": payload})
    assert (answer.status_code, answer.data["error"]["field"]) == (400, "payload")
    assert not Response.objects.exists()


def test_the_axes_of_a_rating_are_those_of_the_project(project, make_item, ann):
    project.task, project.axes = "rating", ["truth", "tone"]
    project.save()
    make_item("one", "yes")
    path = f"assignments/{lease(ann)['id']}/submit"
    for axes in (["truth"], ["truth", "tone", "wit"]):
        payload = {"ratings": dict.fromkeys(axes, 3), "candidate": 0}
        assert ann.post(path, {"payload": payload}).status_code == 400
    payload = {"ratings": {"truth": 5, "tone": 2}, "candidate": 0}
    assert ann.post(path, {"payload": payload}).status_code == 200
    assert Response.objects.get().kind == "rate"


def test_a_draft_comes_back_as_it_was_shown(project, make_item, ann):
    make_item("one", "yes", "no")
    shown = lease(ann)
    assert shown["draft"] is None
    payload = {"better": 1, "worse": 0, "strength": 1}
    assert ann.post(f"assignments/{shown['id']}/draft", {"payload": payload}).status_code == 200
    assert lease(ann)["draft"] == payload


def test_skip_and_flag_give_the_item_to_others(project, make_item, ann):
    make_item("one", "yes", "no")
    make_item("two", "yes", "no")
    assert ann.post(f"assignments/{lease(ann)['id']}/skip", {"reason": "hard"}).status_code == 200
    path = f"assignments/{lease(ann)['id']}/flag"
    assert ann.post(path, {}).data["error"]["field"] == "reason"
    assert ann.post(path, {"reason": "harmful", "candidate": 1}).status_code == 200
    assert lease(ann) is None
    flagged = Response.objects.get(state="flagged")
    assert flagged.payload["candidate"] == flagged.assignment.order[1]


def test_the_assignment_of_another_person_does_not_exist(project, make_item, ann, member, caller):
    make_item("one", "yes", "no")
    shown = lease(ann)
    bob = caller(member("bob", Role.OWNER))
    for verb in ("submit", "skip", "flag", "draft"):
        assert bob.post(f"assignments/{shown['id']}/{verb}", {"reason": "x"}).status_code == 404


def test_judgements_of_simulated_labelers_are_marked(project, make_item, member, admin, caller):
    make_item("one", "yes", "no")
    robot = caller(member("robot", kind=User.Kind.SIMULATED))
    robot.post(f"assignments/{lease(robot)['id']}/submit", {"payload": {"both_bad": [0, 1]}})
    (shown,) = caller(admin).get("responses", project="demo").data["data"]
    assert shown["author_kind"] == "simulated"
    lines = b"".join(caller(admin).get("responses/export", project="demo").streaming_content)
    assert Preference.from_json(json.loads(lines), "line 1").author_kind == "simulated"


def judge(api, payload=None):
    path = f"assignments/{lease(api)['id']}/submit"
    return api.post(path, {"payload": payload or {"tie": [0, 1]}}).data["response"]["id"]


def test_an_annotator_sees_their_own_responses_only(project, make_item, ann, member, caller, admin):
    make_item("one", "yes", "no", needed=2)
    bob = caller(member("bob"))
    mine, other = judge(ann), judge(bob)
    assert [r["id"] for r in ann.get("responses", project="demo").data["data"]] == [mine]
    assert ann.get(f"responses/{other}").status_code == 404
    assert ann.delete(f"responses/{other}").status_code == 404
    reviewer = caller(member("rev", Role.REVIEWER))
    assert len(reviewer.get("responses", project="demo").data["data"]) == 2
    assert reviewer.get(f"responses/{other}").data["payload"] == {"tie": [0, 1]}
    assert len(reviewer.get("responses", project="demo", author="bob").data["data"]) == 1
    assert reviewer.delete(f"responses/{other}").status_code == 404
    assert reviewer.get("responses/export", project="demo").status_code == 403


def test_responses_of_an_item_are_listed_in_its_project_only(
    project, make_item, ann, caller, admin
):
    item, uid = make_item("one", "yes", "no"), judge(ann)
    Project.objects.create(slug="other", name="Other")
    api = caller(admin)
    (found,) = api.get("responses", project="demo", item=item.pk).data["data"]
    assert found["id"] == uid
    assert api.get("responses", project="other", item=item.pk).data["data"] == []
    assert api.get("responses", project="demo", author="nobody").data["data"] == []


def test_a_deleted_judgement_is_erased_and_its_place_is_free(
    project, make_item, ann, member, caller
):
    item = make_item("one", "yes", "no")
    uid = judge(ann)
    answer = caller(member("boss", Role.ADMIN)).delete(f"responses/{uid}")
    assert answer.data == {"id": uid, "state": "deleted", "models": []}
    erased = Response.objects.get()
    assert (erased.payload, erased.in_force, erased.category) == ({}, False, None)
    item.refresh_from_db()
    assert (item.taken, item.submitted, item.state) == (0, 0, "open")
    assert lease(ann) is None  # nobody gets an item twice
    assert judge(caller(member("bob")))


def test_a_reviewer_sees_no_judgement_of_an_item_they_may_judge(make_item, ann, member, caller):
    make_item("one", "yes", "no", needed=2)
    uid = judge(ann)
    reviewer = caller(member("rev", Role.REVIEWER))
    hidden = reviewer.get(f"responses/{uid}").data
    assert (hidden["payload"], hidden["picked_place"]) == (None, None)
    judge(reviewer)
    assert reviewer.get(f"responses/{uid}").data["payload"] == {"tie": [0, 1]}


@pytest.mark.parametrize(("name", "field"), [("pairs", "chosen"), ("kto-pairs", "label")])
def test_judgements_are_exported_in_every_format(make_item, ann, member, caller, name, field):
    make_item("one", "yes", "no")
    judge(ann, {"better": 0, "worse": 1, "strength": 1})
    boss = caller(member("boss", Role.ADMIN))
    lines = b"".join(boss.get("responses/export", project="demo", format=name).streaming_content)
    assert field in json.loads(lines.splitlines()[0])
    table = boss.get("responses/export", project="demo", format="csv")
    assert b"compare" in b"".join(table.streaming_content)
    assert boss.get("responses/export", project="demo", format="x").status_code == 400
    one = boss.get("responses/export", project="demo", consensus="true")
    assert json.loads(b"".join(one.streaming_content))["author"] == "consensus"
