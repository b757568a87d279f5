"""Agreement of labelers, against the package krippendorff and numbers computed by hand."""

import pytest
from pair_payloads import A2, B2, BOTH_BAD, TIE, A, B

from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Item, User


@pytest.fixture
def three(member):
    return [member(name) for name in ("ann", "bea", "cem")]


def test_pairs_agree_about_the_winner(project, three, make_item, judge, figures):
    krippendorff = pytest.importorskip("krippendorff")
    given = [(A, A2, A), (A, B, TIE), (B, B2, B), (TIE, TIE, BOTH_BAD)]
    for n, payloads in enumerate(given):
        item = make_item(f"q{n}", "x", "y", needed=3)
        for user, payload in zip(three, payloads, strict=True):
            judge(user, item, payload)
    found = figures("agreement")
    assert set(found) == {"person"}
    people = found["person"]
    assert (people["items"], people["judgements"], people["unit"]) == (4, 12, "item")
    # 3 of 3 pairs agree, 0 of 3, 3 of 3, 1 of 3
    assert people["raw"]["value"] == pytest.approx((1 + 0 + 1 + 1 / 3) / 4)
    names = {"a": 0, "tie": 1, "b": 2, "both_bad": 3}
    table = [["a", "a", "a"], ["a", "b", "tie"], ["b", "b", "b"], ["tie", "tie", "both_bad"]]
    values = [[names[row[user]] for row in table] for user in range(3)]
    theirs = krippendorff.alpha(reliability_data=values, level_of_measurement="nominal")
    assert people["alpha"]["value"] == pytest.approx(theirs)
    assert people["alpha"]["low"] <= people["alpha"]["value"] <= people["alpha"]["high"]
    # Of judgements with a winner: 3 of 3, 0 of 1, 3 of 3.
    assert people["decided"]["value"] == pytest.approx(2 / 3)


def test_strengths_are_ordinal_without_both_bad(project, three, make_item, judge, figures):
    krippendorff = pytest.importorskip("krippendorff")
    given = [(A2, A, TIE), (B2, B2, B), (TIE, BOTH_BAD, B)]
    for n, payloads in enumerate(given):
        item = make_item(f"q{n}", "x", "y", needed=3)
        for user, payload in zip(three, payloads, strict=True):
            judge(user, item, payload)
    part = figures("agreement")["person"]["parts"][0]
    values = [[-2, 2, 0], [-1, 2, float("nan")], [0, 1, 1]]
    theirs = krippendorff.alpha(
        reliability_data=values, level_of_measurement="ordinal", value_domain=[-2, -1, 0, 1, 2]
    )
    assert (part["name"], part["left_out"]) == ("strength", 1)
    assert part["alpha"]["value"] == pytest.approx(theirs)
    assert len(part["shares"]) == project.scale


def test_thumbs(project, three, make_item, judge, figures):
    krippendorff = pytest.importorskip("krippendorff")
    project.task = "thumbs"
    project.save()
    for n, ups in enumerate([(1, 1, 1), (1, 1, 0), (0, 0, 0)]):
        item = make_item(f"q{n}", "x", needed=3)
        for user, up in zip(three, ups, strict=True):
            judge(user, item, {"up": bool(up), "candidate": 0}, "thumb")
    people = figures("agreement")["person"]
    theirs = krippendorff.alpha(
        reliability_data=[[1, 1, 0], [1, 1, 0], [1, 0, 0]], level_of_measurement="nominal"
    )
    assert people["alpha"]["value"] == pytest.approx(theirs)
    assert (people["decided"], people["parts"]) == (None, [])


def test_ratings_by_axis(project, three, make_item, judge, figures):
    krippendorff = pytest.importorskip("krippendorff")
    project.task, project.axes = "rating", ["truth", "style"]
    project.save()
    truth = [(1, 2, 1), (5, 5, 4), (3, 3, 3)]
    style = [(5, 1, 3), (2, 2, 4), (1, 5, 1)]
    for n, both in enumerate(zip(truth, style, strict=True)):
        item = make_item(f"q{n}", "x", needed=3)
        for k, user in enumerate(three):
            ratings = {"truth": both[0][k], "style": both[1][k]}
            judge(user, item, {"ratings": ratings, "candidate": 0}, "rate")
    people = figures("agreement")["person"]
    parts = {part["name"]: part for part in people["parts"]}
    for name, table in (("truth", truth), ("style", style)):
        theirs = krippendorff.alpha(
            reliability_data=[list(row) for row in zip(*table, strict=True)],
            level_of_measurement="ordinal",
        )
        assert parts[name]["alpha"]["value"] == pytest.approx(theirs), name
    assert (people["items"], people["unit"]) == (6, "axis of an item")


def test_rankings_by_pairs(project, three, make_item, judge, figures):
    project.task = "ranking"
    project.save()
    item = make_item("q", "x", "y", "z", needed=3)
    for user, order in zip(three, [[[0], [1], [2]], [[0], [2], [1]], [[0, 1], [2]]], strict=True):
        judge(user, item, {"order": order}, "rank")
    people = figures("agreement")["person"]
    # (0, 1): a a tie; (0, 2): a a a; (1, 2): a b a
    assert people["items"] == 3
    assert people["raw"]["value"] == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert people["decided"]["value"] == pytest.approx((1 + 1 + 1 / 3) / 3)


def test_consensus_keeps_ties(project, three, make_item, judge, figures):
    given = [(A, A2, A), (A, B, TIE), (A, A, B), (A, B), (TIE,)]
    items = []
    for n, payloads in enumerate(given):
        items.append(make_item(f"q{n}", "x", "y", needed=3))
        for user, payload in zip(three, payloads, strict=False):
            judge(user, items[-1], payload)
    assert figures("consensus")["person"] == {
        "judged": 5,
        "shared": 4,
        "unanimous": 1,
        "majority": 1,
        "without": 2,
        "items": [items[3].pk, items[1].pk],
    }


def test_a_consensus_of_rankings_has_one_best_answer(project, three, make_item, judge, figures):
    project.task = "ranking"
    project.save()
    cycle = [[[0], [1], [2]], [[1], [2], [0]], [[2], [0], [1]]]
    given = [
        [[[1], [0], [2]]] * 3,  # unanimous
        [[[0], [1], [2]], [[0], [2], [1]], [[1], [0], [2]]],  # 0 is best
        cycle,
        [[[2], [1, 0]]],  # of one labeler
    ]
    items = []
    for n, orders in enumerate(given):
        items.append(make_item(f"q{n}", "x", "y", "z", needed=3))
        for user, order in zip(three, orders, strict=False):
            judge(user, items[-1], {"order": order}, "rank")
    assert figures("consensus")["person"] == {
        "judged": 4,
        "shared": 3,
        "unanimous": 1,
        "majority": 1,
        "without": 1,
        "items": [items[2].pk],
    }


def test_only_judgements_that_count(project, three, member, make_item, judge, lease, figures):
    """Each of these would change the figures if it were counted."""
    item = make_item("q", "x", "y", needed=5)
    for user in three[:2]:
        judge(user, item, A)
    before = figures("agreement"), figures("consensus")
    assert before[0]["person"]["raw"]["value"] == 1

    judge(three[0], item, B, repeat=1)
    gold = make_item("gold", "x", "y", purpose=Item.Purpose.GOLD, gold=A, gold_kind="compare")
    for user, payload in zip(three, (A, B, TIE), strict=True):
        judge(user, gold, payload)
    submission.delete(judge(three[2], item, B).pk)
    undone = member("una")
    judge(undone, item, B)
    submission.undo(project, undone)
    late = member("lee")
    Item.objects.filter(pk=item.pk).update(needed=3, taken=3)
    returned = lease(late, item, counted=False)
    returned.state, returned.counted = "returned", True
    returned.save()
    assert submission.submit(returned.pk, late, Judgement("compare", B)).state == "surplus"
    submission.flag(lease(member("flo"), item, counted=False).pk, member("flo"), "odd")
    assert (figures("agreement"), figures("consensus")) == before


def test_a_changed_judgement_counts_as_changed(three, make_item, judge, figures):
    item = make_item("q", "x", "y", needed=2)
    responses = [judge(user, item, payload) for user, payload in zip(three, (A, B), strict=False)]
    assert figures("agreement")["person"]["raw"]["value"] == 0
    submission.change(responses[1].assignment_id, three[1], Judgement("compare", A))
    people = figures("agreement")["person"]
    assert (people["raw"]["value"], people["judgements"]) == (1, 2)


def test_kinds_of_authors_stay_apart(three, member, make_item, judge, figures):
    machine = member("judge", kind=User.Kind.MODEL)
    simulated = [member(f"s{n}", kind=User.Kind.SIMULATED) for n in range(2)]
    for n in range(3):
        item = make_item(f"q{n}", "x", "y", needed=5)
        for user in three[:2]:
            judge(user, item, A)
        judge(machine, item, B)
        for user, payload in zip(simulated, (A, B), strict=True):
            judge(user, item, payload)
    found = figures("agreement")
    shown = {
        kind: (row["judgements"], row["raw"] and row["raw"]["value"]) for kind, row in found.items()
    }
    assert shown == {"person": (6, 1), "simulated": (6, 0), "model": (3, None)}
