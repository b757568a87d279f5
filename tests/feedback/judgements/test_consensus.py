"""One record for each item from its judgements, and what gives none."""

import pytest

from openpalm.data.rows.read_result import StreamCounts
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.consensus import NO_MAJORITY, OF_TEXTS, consensus_records
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Item

A, B = {"better": 0, "worse": 1, "strength": 1}, {"better": 1, "worse": 0, "strength": 2}
TIE = {"tie": [0, 1]}


@pytest.fixture
def judged(project, member, make_item):
    """judged((payload, ...), ...): an item for each, judged by ann, bob, cat in their order."""

    def make(*items, kind="compare", answers=("x", "y"), **fields):
        made = []
        for number, payloads in enumerate(items):
            made.append(make_item(f"q {number}", *answers, needed=len(payloads), **fields))
            for name, payload in zip(("ann", "bob", "cat"), payloads, strict=False):
                assignment = queue.next_assignment(project, member(name))
                assert assignment.item_id == made[-1].pk
                submission.submit(assignment.pk, member(name), Judgement(kind, payload, 9, 1))
        return made

    return make


def test_each_item_gives_one_record_or_a_reason(project, judged):
    first, split, tied = judged((A, A, B), (A, B), (TIE, TIE, A))
    counts = StreamCounts()
    found = list(consensus_records(project, counts))
    assert [record.payload for record in found] == [A, TIE]
    assert [record.id for record in found] == [
        f"item {first.pk} by person: consensus of 3",
        f"item {tied.pk} by person: consensus of 3",
    ]
    assert {record.author for record in found} == {"consensus"}
    assert {record.guideline_version for record in found} == {"1"}
    assert dict(counts.unused) == {NO_MAJORITY: 1}
    assert counts.places[NO_MAJORITY] == [f"item {split.pk} by person"]


def test_kinds_of_authors_stay_apart_and_only_what_counts_is_read(
    project, member, judged, make_item
):
    judged((A,))
    Item.objects.update(needed=3, state=Item.State.OPEN)
    simulated = member("sim", kind="simulated")
    assignment = queue.next_assignment(project, simulated)
    submission.submit(assignment.pk, simulated, Judgement("compare", B))
    undone = member("una")
    submission.submit(queue.next_assignment(project, undone).pk, undone, Judgement("compare", B))
    submission.undo(project, undone)
    make_item("gold", "x", "y", purpose=Item.Purpose.GOLD, gold=A, gold_kind="compare")
    found = list(consensus_records(project, StreamCounts()))
    assert [(record.author_kind, record.payload) for record in found] == [
        ("person", A),
        ("simulated", B),
    ]


def test_rankings_are_ordered(project, judged):
    project.task = "ranking"
    project.save()
    orders = ([[0], [1], [2]], [[2], [0], [1]], [[0], [2], [1]])
    judged(tuple({"order": order} for order in orders), kind="rank", answers=("x", "y", "z"))
    [record] = consensus_records(project, StreamCounts())
    assert record.payload == {"order": [[0], [2], [1]]}


def test_texts_are_left_out(project, judged):
    project.task = "edit"
    project.save()
    judged(({"candidate": 0, "text": "better"},), kind="edit", answers=("x",))
    counts = StreamCounts()
    assert list(consensus_records(project, counts)) == []
    assert dict(counts.unused) == {OF_TEXTS: 1}
