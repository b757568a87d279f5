"""Managers' pages of items and judgements: blinding, gold, withdrawal, deletion, flags, export."""

import csv
import io
import json

import pytest

from openpalm.errors import DataError
from openpalm.feedback.items import item_changes
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.queue import next_assignment
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import (
    Assignment,
    Candidate,
    Event,
    Item,
    ModelVersion,
    Response,
    Role,
    Snapshot,
    SnapshotJudgement,
    Statistic,
    TrainRun,
)

A_BETTER = Judgement("compare", {"better": 0, "worse": 1, "strength": 1}, 1500, 1)


@pytest.fixture
def named(project, make_item):
    """An open item of two judgements with named models."""
    item = make_item("question", "yes", "no", needed=2)
    model = ModelVersion.objects.create(project=project, name="secret-model")
    Candidate.objects.update(model=model, checkpoint="secret-hash")
    return item


def judge(project, user, judgement=A_BETTER):
    assignment = next_assignment(project, user)
    assert assignment is not None
    return submission.submit(assignment.pk, user, judgement)


def test_who_may_still_judge_sees_neither_names_nor_judgements(named, project, member, signed_in):
    judge(project, member("ann"))
    for user in (member("rea", Role.REVIEWER), member("olga", Role.OWNER)):
        client = signed_in(user)
        for path in (f"items/{named.pk}", "responses", "items"):
            page = client.get(f"/p/demo/{path}").content.decode()
            assert "secret" not in page
            assert "A better than B" not in page
    reviewer = member("rea", Role.REVIEWER)
    judge(project, reviewer)
    page = signed_in(reviewer).get(f"/p/demo/items/{named.pk}").content.decode()
    assert "secret-model" in page
    assert "A better than B" in page
    complete = signed_in(member("olga", Role.OWNER)).get(f"/p/demo/items/{named.pk}")
    assert b"secret-model" in complete.content, "nobody can be given a complete item"


def test_an_admin_who_looks_is_never_given_the_item(named, project, member, signed_in):
    admin = member("max", Role.ADMIN)
    client = signed_in(admin)
    client.post(f"/p/demo/items/{named.pk}/change", {"action": "reveal"})
    assert b"secret-model" in client.get(f"/p/demo/items/{named.pk}").content
    assert next_assignment(project, admin) is None
    named.refresh_from_db()
    assert named.taken == 0, "it took no place"
    assert Event.objects.latest("id").action == "item.reveal"


def test_a_withdrawn_item_goes_to_nobody(named, project, member, signed_in):
    client = signed_in(member("max", Role.ADMIN))
    held = next_assignment(project, member("ann"))
    assert held is not None
    client.post(f"/p/demo/items/{named.pk}/change", {"action": "withdraw"})
    assert next_assignment(project, member("bea")) is None
    late = submission.submit(held.pk, member("ann"), A_BETTER)
    assert late.state == Response.State.SURPLUS
    named.refresh_from_db()
    assert (named.state, named.taken, named.submitted) == (Item.State.WITHDRAWN, 0, 0)
    client.post(f"/p/demo/items/{named.pk}/change", {"action": "reopen"})
    assert next_assignment(project, member("bea")) is not None


def test_a_gold_item_goes_to_everybody_and_hides_its_answer(named, project, member, signed_in):
    judge(project, member("ann"))
    admin = member("max", Role.ADMIN)
    signed_in(admin).post(f"/p/demo/items/{named.pk}/gold", {"choice": "1"})
    named.refresh_from_db()
    assert (named.purpose, named.gold, named.taken) == (
        Item.Purpose.GOLD, {"better": 1, "worse": 0, "strength": 1}, 0,
    )  # fmt: skip
    project.gold_share = 1.0
    project.save()
    for name in ("bea", "cid", "dan"):
        assignment = next_assignment(project, member(name))
        assert assignment is not None
        assert not assignment.counted
        judge(project, member(name))
    page = signed_in(member("rea", Role.REVIEWER)).get(f"/p/demo/items/{named.pk}").content
    assert b"Expected answer:" not in page


def test_gold_from_a_judgement(named, project, member, signed_in):
    response = judge(project, member("ann"))
    client = signed_in(member("max", Role.ADMIN))
    client.post(f"/p/demo/items/{named.pk}/gold", {"response": response.pk})
    named.refresh_from_db()
    assert named.gold == A_BETTER.payload
    for wrong in ("999999", "9" * 5000, "-1", "x"):
        other = client.post(f"/p/demo/items/{named.pk}/gold", {"response": wrong}, follow=True)
        assert b"not in force" in other.content


def test_a_priority_is_set_and_in_the_audit_log(named, member, signed_in):
    client = signed_in(member("max", Role.ADMIN))
    client.post(f"/p/demo/items/{named.pk}/change", {"action": "priority", "priority": "2.5"})
    named.refresh_from_db()
    assert named.priority == 2.5
    event = Event.objects.get(action="item.priority")
    assert (event.target, event.data) == (f"item {named.pk}", {"priority": 2.5})


@pytest.mark.parametrize("priority", ["", "nan", "inf", "1e999", "many"])
def test_priorities_are_numbers(named, member, signed_in, priority):
    client = signed_in(member("max", Role.ADMIN))
    client.post(f"/p/demo/items/{named.pk}/change", {"action": "priority", "priority": priority})
    named.refresh_from_db()
    assert named.priority == 0.0


def test_a_deleted_judgement_leaves_no_content_and_names_its_models(
    named, project, member, signed_in
):
    response = judge(project, member("ann"))
    snapshot = Snapshot.objects.create(project=project, digest="d", path="x")
    SnapshotJudgement.objects.create(snapshot=snapshot, response=response)
    run = TrainRun.objects.create(project=project, verb="dpo", snapshot=snapshot)
    first = ModelVersion.objects.create(project=project, name="trained", run=run)
    ModelVersion.objects.create(project=project, name="grandchild", parent=first)
    client = signed_in(member("max", Role.ADMIN))
    page = client.get(f"/p/demo/responses/{response.pk}/delete").content
    assert b"trained" in page
    assert b"grandchild" in page
    for _ in range(2):
        client.post(f"/p/demo/responses/{response.pk}/delete")
    response.refresh_from_db()
    named.refresh_from_db()
    assert (response.payload, response.reason, response.in_force) == ({}, "", False)
    assert (named.submitted, named.taken) == (0, 0), "another person may take its place"
    event = Event.objects.get(action="judgement.deleted")
    assert event.data["models"] == ["trained", "grandchild"]
    assert "better" not in json.dumps(event.data), "the log does not keep what was erased"
    assert SnapshotJudgement.objects.count() == 1, "the lineage stays"


def test_flags_wait_until_they_are_resolved(named, project, member, signed_in):
    assignment = next_assignment(project, member("ann"))
    assert assignment is not None
    flag = submission.flag(assignment.pk, member("ann"), "both <b>empty</b>")
    client = signed_in(member("max", Role.ADMIN))
    assert b"both &lt;b&gt;empty" in client.get("/p/demo/flags").content
    assert str(named.pk).encode() in client.get("/p/demo/items?only=flagged").content
    client.post(f"/p/demo/flags/{flag.pk}/resolve")
    assert b"No open flag" in client.get("/p/demo/flags").content
    assert b"No item" in client.get("/p/demo/items?only=flagged").content


def test_pages_go_back_and_forth(project, make_item, member, signed_in):
    ids = [make_item(f"q{n}", "a", "b").pk for n in range(120)]
    client = signed_in(member("rea", Role.REVIEWER))

    def shown(address):
        page = client.get(f"/p/demo/items{address}").content.decode()
        return [n for n in reversed(ids) if f'/items/{n}"' in page], page

    first, page = shown("")
    assert first == ids[:69:-1]
    older = page.split('rel="next"')[0].rpartition('href="')[2].split('"')[0]
    second, page = shown(older)
    assert second == ids[69:19:-1]
    newer = page.split('rel="prev"')[0].rpartition('href="')[2].split('"')[0]
    assert shown(newer)[0] == first
    assert shown("?state=complete")[0] == []


# Export.


def export(client, **query):
    response = client.get("/p/demo/export/download", query)
    assert response.status_code == 200
    return b"".join(response.streaming_content).decode(), response


def test_records_by_kind_of_author(named, project, member, signed_in):
    judge(project, member("ann"))
    judge(project, member("sim", kind="simulated"))
    client = signed_in(member("max", Role.ADMIN))
    text, response = export(client, format="records", by="person")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["author"], row["author_kind"]) for row in rows] == [("ann", "person")]
    assert response["Content-Disposition"] == 'attachment; filename="demo-records.jsonl"'
    assert len(export(client, format="pairs")[0].splitlines()) == 2
    assert len(export(client, format="pairs", since="2999-01-01")[0]) == 0
    event = Event.objects.filter(action="export.downloaded").earliest("id")
    assert event.data == {"by": ["person"], "state": "submitted"}


def test_the_page_says_what_a_file_could_not_hold(project, make_item, member, signed_in):
    for number, payload in enumerate(({"tie": [0, 1]}, {"both_bad": [0, 1]}, A_BETTER.payload)):
        make_item(f"q {number}", "yes", "no", needed=1)
        judge(project, member("ann"), Judgement("compare", payload))
    client = signed_in(member("max", Role.ADMIN))
    assert len(export(client, format="pairs", consensus="1")[0].splitlines()) == 1
    written = Event.objects.get(action="export.written")
    assert written.data == {"rows": 1, "left_out": {"tie": 1, "both bad": 1}}
    page = client.get("/p/demo/export").content.decode()
    assert "1 row; 1 left out: " in page
    assert "1 left out: both bad" in page


def test_a_table_runs_no_formula(project, make_item, member, signed_in):
    make_item("=cmd|' /C calc'!A0", '@SUM(1)*"', "+1", needed=1)
    judge(project, member("ann"))
    client = signed_in(member("max", Role.ADMIN))
    text, _ = export(client, format="csv")
    for cells in csv.reader(io.StringIO(text.removeprefix("\ufeff"))):
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    project.events.create(action="item.x", target="=1+1", data={})
    log = client.get("/p/demo/audit?format=csv")
    rows = list(csv.reader(io.StringIO(b"".join(log.streaming_content).decode())))
    assert "'=1+1" in [row[4] for row in rows]


def test_the_overview_shows_figures_with_their_time(project, make_item, member, signed_in):
    make_item("q", "a", "b")
    row = {"name": "ann", "author_kind": "person", "judgements": 7, "skips": 1, "flags": 2}
    Statistic.objects.create(
        project=project, name="labelers", value={"rows": [row | {"median_s": 12.34}]}
    )
    page = signed_in(member("rea", Role.REVIEWER)).get("/p/demo/").content.decode()
    assert "who=ann" in page
    assert ">12.3<" in page
    assert "Computed 20" in page


def test_unknown_formats_are_refused(project, member, signed_in):
    client = signed_in(member("max", Role.ADMIN))
    assert client.get("/p/demo/export/download?format=../../x").status_code == 422


# Projects.


def test_settings_that_give_judgements_their_meaning_are_frozen(named, project, member, signed_in):
    judge(project, member("ann"))
    client = signed_in(member("max", Role.ADMIN))
    form = {
        "name": "New", "task": "rating", "scale": "7", "axes": "x", "overlap": "3",
        "gold_share": "20", "repeat_share": "5", "lease_minutes": "10",
    }  # fmt: skip
    assert client.post("/p/demo/settings", form).status_code == 302
    project.refresh_from_db()
    assert (project.task, project.scale, project.axes) == ("pair", 5, [])
    assert (project.name, project.overlap, project.gold_share) == ("New", 3, 0.2)
    changed = Event.objects.get(action="project.changed").data["changed"]
    assert changed["overlap"] == [1, 3]
    assert client.post("/p/demo/settings", form | {"gold_share": "90"}).status_code == 422
    client.post("/p/demo/settings", form | {"decided_by": "simulated"})
    project.refresh_from_db()
    assert project.decided_by == "simulated"
    changed = Event.objects.filter(action="project.changed").latest("pk").data["changed"]
    assert changed["decided_by"] == ["person", "simulated"]


def test_a_project_is_closed_by_its_owner_and_keeps_everything(named, project, member, signed_in):
    judge(project, member("ann"))
    admin, owner = signed_in(member("max", Role.ADMIN)), signed_in(member("olga", Role.OWNER))
    assert admin.post("/p/demo/close", {"slug": "demo"}).status_code == 403
    owner.post("/p/demo/close", {"slug": "wrong"})
    project.refresh_from_db()
    assert project.open
    owner.post("/p/demo/close", {"slug": "demo"})
    project.refresh_from_db()
    assert not project.open
    assert next_assignment(project, member("bea")) is None
    assert Response.objects.filter(in_force=True).count() == 1
    owner.post("/p/demo/reopen")
    project.refresh_from_db()
    assert next_assignment(project, member("bea")) is not None


def test_a_new_version_of_the_guidelines(project, member, signed_in):
    client = signed_in(member("max", Role.ADMIN))
    preview = client.post("/p/demo/guidelines/edit", {"text": "**new**", "preview": "1"})
    assert b"<strong>new</strong>" in preview.content
    assert project.guideline.version == 1
    client.post(
        "/p/demo/guidelines/edit",
        {"text": "Prefer *true* answers.\n\n[x](javascript:1) ![y](http://evil/y)"},
    )
    assert project.guideline.version == 2
    page = client.get("/p/demo/guidelines/versions").content.decode()
    assert "<ins>+ [x](javascript:1) " in page
    assert "<img" not in page
    assert 'href="javascript' not in page
    same = client.post("/p/demo/guidelines/edit", {"text": project.guideline.text})
    assert same.status_code == 422


def test_no_lease_is_lost_to_a_reveal(named, project, member):
    ann = member("ann")
    assert next_assignment(project, ann) is not None
    with pytest.raises(DataError, match="have this item open"):
        item_changes.reveal(named, ann)
    assert Assignment.objects.get().state == Assignment.State.OPEN


def test_a_long_answer_does_not_hide_what_follows(project, make_item, member, signed_in):
    item = make_item("question", "word " * 2000, "short", needed=1)
    client = signed_in(member("rea", Role.REVIEWER))
    page = client.get(f"/p/demo/items/{item.pk}").content.decode()
    assert page.count('class="card bounded" tabindex="0"') == 1, "the long one scrolls by itself"
    assert page.count("word " * 1999) == 1, "and nothing of it is cut"
