"""`openpalm feedback export` and `import`: what one writes the other reads."""

import json

import pytest
from django.utils import timezone

from openpalm.cli import feedback_site
from openpalm.cli.main import main
from openpalm.data.rows.preferences import Preference
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Assignment, Event, Item, Project, Prompt, Response
from openpalm.feedback.training.snapshots import Filter, freeze

BETTER = Judgement("compare", {"better": 0, "worse": 1, "strength": 2})


@pytest.fixture(autouse=True)
def _same_database(monkeypatch):
    """The command opens the site of the tests."""
    monkeypatch.setattr(feedback_site.Site, "set_environment", lambda self: None)
    monkeypatch.setattr(feedback_site.Site, "check_database", lambda self: None)
    monkeypatch.setattr(feedback_site, "open_database", lambda migrate: None)


@pytest.fixture
def judged(project, member, make_item):
    for n in range(3):
        make_item(f"question {n}", f"yes {n}", f"no {n}")
    for _ in range(3):
        assignment = queue.next_assignment(project, member("ann"))
        submission.submit(assignment.pk, member("ann"), BETTER)
    return project


def feedback(*words):
    return main(["feedback", *map(str, words)])


def test_what_is_exported_is_imported_again_as_gold_items(judged, tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    assert feedback("export", "demo", "--out", file) == 0
    assert f"{file}: 3 rows" in capsys.readouterr().out
    records = [
        Preference.from_json(json.loads(line), "file")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert {record.payload["strength"] for record in records} == {2}
    other = Project.objects.create(slug="other", name="Other")
    assert feedback("import", "other", file, "--gold") == 0
    assert "3 rows, 3 added" in capsys.readouterr().out
    gold = Item.objects.filter(project=other, purpose="gold")
    assert [item.gold for item in gold] == [BETTER.payload] * 3
    assert feedback("import", "other", file, "--gold") == 0
    said = capsys.readouterr()
    assert "3 rows, 0 added" in said.out
    assert "already in the project" in said.err
    assert set(Event.objects.values_list("action", flat=True)) == {
        "export.downloaded",
        "import.done",
    }


def test_pairs_are_exported_and_what_gives_none_is_counted(judged, member, tmp_path, capsys):
    submission.change(
        judged.assignments.first().pk, member("ann"), Judgement("compare", {"tie": [0, 1]})
    )
    file = tmp_path / "pairs.jsonl"
    assert feedback("export", "demo", "--format", "pairs", "--out", file) == 0
    said = capsys.readouterr()
    assert "2 rows" in said.out
    assert "tie" in said.err
    assert len(file.read_text(encoding="utf-8").splitlines()) == 2


def test_prompts_are_held_out_by_their_text(project, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "p {n}"}}\n' for n in range(20)), encoding="utf-8")
    assert feedback("import", "demo", file, "--what", "prompts", "--held-out", 0.5) == 0
    held = Prompt.objects.filter(held_out=True).count()
    assert 0 < held < 20
    assert f"20 rows, 20 added, {held} of them held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "nothing", "--out", "x.jsonl"), "--project nothing: the site has no such"),
        (("export", "demo"), "--out"),
        (("export", "demo", "--out", "x", "--format", "xml"), "--format xml: must be one of"),
        (("import", "demo", "missing.jsonl"), "--file missing.jsonl: there is no such file"),
        (("import", "demo", "x", "--what", "all"), "--what all: must be items or prompts"),
        (("import", "demo", "x", "--held-out", "2"), "--held-out 2"),
    ],
)
def test_a_wrong_request_is_one_line(project, capsys, words, says):
    assert feedback(*words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_consensus_is_exported_with_what_has_none(project, member, make_item, tmp_path, capsys):
    other = Judgement("compare", {"better": 1, "worse": 0, "strength": 1})
    for n, judgements in enumerate(((BETTER, BETTER), (BETTER, other))):
        make_item(f"question {n}", "yes", "no", needed=2)
        for name, judgement in zip(("ann", "bob"), judgements, strict=True):
            assignment = queue.next_assignment(project, member(name))
            submission.submit(assignment.pk, member(name), judgement)
    file = tmp_path / "pairs.jsonl"
    assert feedback("export", "demo", "--format", "pairs", "--consensus", "--out", file) == 0
    said = capsys.readouterr()
    assert "1 rows" in said.out
    assert "1 left out: no majority" in said.err
    [row] = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert (row["chosen"][-1]["content"], row["rejected"][-1]["content"]) == ("yes", "no")


def test_more_rows_than_sqlite_takes_at_once_are_exported(project, member, tmp_path):
    """SQLite refuses Django's prefetch of 999 rows and more."""
    add_items(
        project,
        [
            NewItem(
                [{"role": "user", "content": f"q {n}"}],
                (NewCandidate(f"a {n}"), NewCandidate(f"b {n}")),
                "typed",
            )
            for n in range(1100)
        ],
    )
    now, ann = timezone.now(), member("ann")
    assignments = Assignment.objects.bulk_create(
        Assignment(
            item=item, user=ann, project=project, order=[0, 1], leased_at=now, expires_at=now
        )
        for item in Item.objects.order_by("id")
    )
    Response.objects.bulk_create(
        Response(
            assignment=one,
            item=one.item,
            user=ann,
            project=project,
            author_kind="person",
            state="submitted",
            kind="compare",
            payload=BETTER.payload,
        )
        for one in assignments
    )
    file = tmp_path / "out.jsonl"
    assert feedback("export", "demo", "--out", file) == 0
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["candidates"][0]["text"] for line in lines]
    assert texts == [f"a {n}" for n in range(1100)]
    project.task = "rating"
    project.save()
    assert feedback("export", "demo", "--out", file) == 0
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1100
    assert freeze(project, Filter(), None).judgements == 1100
