"""Snapshots: which judgements are frozen, the file, the rows of its lineage."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from openpalm.data.rows.readers.pairs import read_pairs
from openpalm.errors import DataError
from openpalm.feedback.judgements import submission
from openpalm.feedback.models import Item, Snapshot, SnapshotJudgement, User
from openpalm.feedback.statistics.selection import in_reserve
from openpalm.feedback.training import snapshots
from openpalm.feedback.training.snapshots import Filter


@pytest.fixture
def ann(member):
    return member("ann")


def _rows(snapshot: Snapshot) -> list[dict]:
    text = Path(snapshot.path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_file_is_named_by_its_content_and_trains(project, make_item, judge, ann):
    kept = [judge(make_item(f"question {n}", "good", "bad"), ann, better=n % 2) for n in range(3)]
    snapshot = snapshots.freeze(project, Filter(), ann)
    path = Path(snapshot.path)
    content = path.read_bytes()
    assert path.stem == snapshot.digest == hashlib.sha256(content).hexdigest()
    assert [row["id"] for row in _rows(snapshot)] == [str(response.uid) for response in kept]
    assert snapshot.judgements == 3
    assert snapshot.counts == {
        "author_kind": {"person": 3},
        "kind": {"compare": 3},
        "author": {"ann": 3},
    }
    rows = SnapshotJudgement.objects.filter(snapshot=snapshot)
    assert set(rows.values_list("response", flat=True)) == {response.pk for response in kept}
    pairs = read_pairs(path).items
    assert [pair.chosen[0].content for pair in pairs] == ["good", "bad", "good"]
    assert list(path.parent.iterdir()) == [path]


def test_the_same_judgements_are_the_same_snapshot(project, make_item, judge, ann):
    judge(make_item("question", "a", "b"), ann)
    first = snapshots.freeze(project, Filter(), ann)
    assert snapshots.freeze(project, Filter(), ann) == first
    judge(make_item("another", "a", "b"), ann)
    assert snapshots.freeze(project, Filter(), ann) != first
    assert snapshots.freeze(project, Filter(up_to=first.rows.get().response_id), ann) == first


def test_what_is_never_frozen(project, make_item, judge, ann, member):
    kept = judge(make_item("kept", "a", "b"), ann)
    held_out = make_item("held out", "a", "b")
    type(held_out.prompt).objects.filter(pk=held_out.prompt_id).update(held_out=True)
    judge(held_out, ann)
    judge(make_item("gold", "a", "b", purpose=Item.Purpose.GOLD, gold={"better": 0}), ann)
    judge(make_item("compared", "a", "b", purpose=Item.Purpose.COMPARISON), ann)
    judge(make_item("simulated", "a", "b"), member("sim", kind=User.Kind.SIMULATED))
    judge(make_item("by a model", "a", "b"), member("ai", kind=User.Kind.MODEL))
    judge(make_item("undone", "a", "b"), ann)
    submission.undo(project, ann)
    snapshot = snapshots.freeze(project, Filter(), ann)
    assert [row["id"] for row in _rows(snapshot)] == [str(kept.uid)]


@pytest.mark.parametrize(
    ("chosen", "texts"),
    [
        (Filter(author_kinds=["simulated"]), ["simulated"]),
        (Filter(author_kinds=["person", "model"]), ["kept", "by a model"]),
        (Filter(comparisons=True), ["kept", "compared"]),
        (Filter(kinds=["edit"]), None),
    ],
)
def test_the_filter(project, make_item, judge, ann, member, chosen, texts):
    judge(make_item("kept", "a", "b"), ann)
    judge(make_item("compared", "a", "b", purpose=Item.Purpose.COMPARISON), ann)
    judge(make_item("simulated", "a", "b"), member("sim", kind=User.Kind.SIMULATED))
    judge(make_item("by a model", "a", "b"), member("ai", kind=User.Kind.MODEL))
    if texts is None:
        with pytest.raises(DataError, match="nothing to train on"):
            snapshots.freeze(project, chosen, ann)
        return
    snapshot = snapshots.freeze(project, chosen, ann)
    assert [row["prompt"][0]["content"] for row in _rows(snapshot)] == texts
    kinds = {row["author_kind"] for row in _rows(snapshot)}
    assert set(snapshot.counts["author_kind"]) == kinds


def test_only_the_newest_of_a_changed_judgement(project, make_item, judge, ann):
    judge(make_item("question", "a", "b"), ann)
    assignment = submission.undo(project, ann)
    new = submission.submit(
        assignment.pk, ann, submission.Judgement("compare", {"tie": [0, 1]}, 1000)
    )
    snapshot = snapshots.freeze(project, Filter(), ann)
    assert [row["id"] for row in _rows(snapshot)] == [str(new.uid)]


def test_a_wrong_kind_of_author():
    with pytest.raises(DataError, match="dog"):
        Filter(author_kinds=["dog"])


def test_the_random_arms_prompts_can_be_held_back(project, member, make_item, judge):
    for number in range(30):
        judge(make_item(f"question {number}", "yes", "no"), member("ann"))
    kept = snapshots.freeze(project, Filter(hold_back=True), None)
    held_back = kept.counts["held_back"]["judgements"]
    assert 0 < held_back < 20
    assert kept.judgements == 30 - held_back
    trained = SnapshotJudgement.objects.filter(snapshot=kept)
    prompts = trained.values_list("response__item__prompt", flat=True)
    assert not any(in_reserve(pk, project_seed=project.pk) for pk in prompts)
    assert snapshots.freeze(project, Filter(), None).judgements == 30


def test_the_lineage_is_stored_in_short_transactions_and_continues(
    project, make_item, judge, ann, monkeypatch
):
    """A worker that was killed between two of them leaves the rest to the next one."""
    made = [judge(make_item(f"question {n}", "a", "b"), ann) for n in range(7)]
    monkeypatch.setattr(snapshots, "BATCH", 2)
    done = []

    @contextmanager
    def writing():
        if len(done) == 3:
            raise KeyboardInterrupt
        yield
        done.append(SnapshotJudgement.objects.count())

    with pytest.raises(KeyboardInterrupt):
        snapshots.freeze(project, Filter(), ann, writing)
    assert done == [0, 2, 4]
    snapshot = snapshots.freeze(project, Filter(), ann)
    linked = snapshot.rows.order_by("response").values_list("response", flat=True)
    assert list(linked) == [response.pk for response in made]
    assert snapshot == Snapshot.objects.get()
