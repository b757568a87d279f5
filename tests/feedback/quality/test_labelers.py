"""Rows of each labeler: work, time, gold, repetitions, others, sides; and the sums over them."""

from datetime import timedelta

import pytest
from pair_payloads import A2, B2, BOTH_BAD, TIE, A, B

from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Item, Response, User
from openpalm.feedback.quality.labelers import alike
from openpalm.feedback.statistics.intervals import wilson


def rows(figures):
    return {row["name"]: row for row in figures("labelers")["rows"]}


def test_work_and_time(member, make_item, judge, lease, figures):
    ann, bea = member("ann"), member("bea")
    for n, elapsed in enumerate([1000, 3000, 8000]):
        judge(ann, make_item(f"q{n}", "x", "y"), A, elapsed_ms=elapsed)
    submission.skip(lease(ann, make_item("s", "x", "y")).pk, ann, "unsure", 90_000)
    for n in range(2):
        submission.flag(lease(bea, make_item(f"f{n}", "x", "y")).pk, bea, "wrong")
    found = rows(figures)
    ann, bea = found["ann"], found["bea"]
    assert [ann[k] for k in ("judgements", "skips", "flags", "median_s")] == [3, 1, 0, 3.0]
    assert [bea[k] for k in ("judgements", "skips", "flags", "median_s")] == [0, 0, 2, None]
    assert list(found) == ["ann", "bea"]


def test_gold_and_repetitions(member, make_item, judge, figures):
    ann = member("ann")
    expected = [(A, A2), (A, B), (TIE, TIE), (BOTH_BAD, TIE)]
    for n, (gold, given) in enumerate(expected):
        item = make_item(f"g{n}", "x", "y", purpose="gold", gold=gold, gold_kind="compare")
        judge(ann, item, given)
    for n, (first, again) in enumerate([(A, A2), (B2, B), (A, B)]):
        item = make_item(f"q{n}", "x", "y")
        judge(ann, item, first)
        judge(ann, item, again, repeat=1)
    row = rows(figures)["ann"]
    assert row["gold"] == wilson(2, 4)._asdict()
    assert row["self"] == pytest.approx(wilson(2, 3)._asdict())
    assert (row["gold_items"], row["repeats"], row["judgements"]) == (4, 3, 10)
    assert row["shared_items"] == 0


def test_agreement_with_others(member, make_item, judge, figures):
    """People and models are measured against people; simulated labelers against each other."""
    ann, bea = member("ann"), member("bea")
    machine = member("judge", kind=User.Kind.MODEL)
    sims = [member(name, kind=User.Kind.SIMULATED) for name in ("s1", "s2")]
    table = [(A, A, A, B, B), (A, B, B, B, A), (B, B2, A, A, A)]
    for n, payloads in enumerate(table):
        item = make_item(f"q{n}", "x", "y", needed=5)
        for user, payload in zip((ann, bea, machine, *sims), payloads, strict=True):
            judge(user, item, payload)
    found = rows(figures)
    assert found["ann"]["others"]["value"] == pytest.approx(2 / 3)
    # The machine: agrees with both, with one of two, with none.
    assert found["judge"]["others"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["s1"]["others"]["value"] == pytest.approx(2 / 3)
    judges = figures("ai_judges")
    assert [row["name"] for row in judges["rows"]] == ["judge"]
    assert judges["people"]["value"] == pytest.approx(2 / 3)


def test_a_lone_machine_has_nobody_to_agree_with(member, make_item, judge, figures):
    item = make_item("q", "x", "y", needed=2)
    judge(member("judge", kind=User.Kind.MODEL), item, A)
    judge(member("sim", kind=User.Kind.SIMULATED), item, A)
    assert {row["others"] is None for row in rows(figures).values()} == {True}


def test_sides(member, make_item, judge, figures):
    ann, sim = member("ann"), member("sim", kind=User.Kind.SIMULATED)
    for n, (payload, order) in enumerate([(A, [0, 1]), (A, [1, 0]), (B, [1, 0]), (TIE, [0, 1])]):
        item = make_item(f"q{n}", "x", "y", needed=2)
        judge(ann, item, payload, order=order)
        judge(sim, item, B, order=[0, 1])
        judge(ann, item, A, order=[0, 1], repeat=1)
    gold = make_item("g", "x", "y", purpose="gold", gold=A, gold_kind="compare")
    judge(ann, gold, A, order=[0, 1])
    found = rows(figures)
    assert (found["ann"]["left"]["value"], found["ann"]["decided"]) == (pytest.approx(2 / 3), 3)
    bias = figures("position_bias")
    assert bias["person"] == {"left": found["ann"]["left"], "judgements": 3}
    assert bias["simulated"]["left"]["value"] == 0


def test_undone_changed_and_deleted_judgements_leave_the_rows(
    project, member, make_item, judge, figures
):
    ann = member("ann")
    kept = judge(ann, make_item("q0", "x", "y"), A, elapsed_ms=2000)
    submission.change(kept.assignment_id, ann, Judgement("compare", B, elapsed_ms=4000))
    deleted = judge(ann, make_item("q1", "x", "y"), A, elapsed_ms=50_000)
    submission.delete(deleted.pk)
    judge(ann, make_item("q2", "x", "y"), A, elapsed_ms=50_000)
    submission.undo(project, ann)
    row = rows(figures)["ann"]
    assert (row["judgements"], row["median_s"], row["decided"]) == (1, 4.0, 1)
    assert row["left"]["value"] == 0
    assert figures("progress")["responses"]["person"] == {
        "submitted": 1,
        "superseded": 1,
        "deleted": 1,
        "undone": 1,
    }


def test_time_by_day(member, make_item, judge, figures):
    ann = member("ann")
    made = [
        judge(ann, make_item(f"q{n}", "x", "y"), A, elapsed_ms=ms)
        for n, ms in enumerate([1000, 2000, 6000])
    ]
    earlier = made[0].created_at - timedelta(days=2)
    Response.objects.filter(pk=made[0].pk).update(created_at=earlier)
    people = figures("time")["person"]
    assert (people["median_s"], people["judgements"]) == (2.0, 3)
    assert people["days"] == [
        {"day": earlier.date().isoformat(), "judgements": 1, "median_s": 1.0},
        {"day": made[1].created_at.date().isoformat(), "judgements": 2, "median_s": 4.0},
    ]


def test_progress(member, make_item, judge, figures):
    ann = member("ann")
    judge(ann, make_item("q0", "x", "y", needed=2), A)
    judge(ann, make_item("q1", "x", "y", needed=1), A)
    make_item("q2", "x", "y", needed=3)
    make_item("q3", "x", "y", needed=9, state=Item.State.WITHDRAWN)
    make_item("g", "x", "y", needed=9, purpose="gold", gold=A, gold_kind="compare")
    found = figures("progress")
    assert found["items"] == {
        "training": {"open": 2, "complete": 1, "withdrawn": 1},
        "gold": {"open": 1},
    }
    assert (found["needed"], found["submitted"], found["left"]) == (6, 2, 4)


@pytest.mark.parametrize(
    ("kind", "one", "two", "expected"),
    [
        ("compare", A, A2, True),
        ("compare", A, TIE, False),
        ("compare", TIE, BOTH_BAD, False),
        ("rank", {"order": [[0, 1], [2]]}, {"order": [[1, 0], [2]]}, True),
        ("rank", {"order": [[0], [1], [2]]}, {"order": [[0, 1], [2]]}, False),
        ("rate", {"ratings": {"a": 3, "b": 1}}, {"ratings": {"a": 4, "b": 1}}, True),
        ("rate", {"ratings": {"a": 3, "b": 1}}, {"ratings": {"a": 3, "b": 3}}, False),
        ("thumb", {"up": True}, {"up": False}, False),
        ("write", {"text": "x"}, {"text": "x"}, None),
    ],
)
def test_alike(kind, one, two, expected):
    assert alike(kind, one, kind, two) is expected
