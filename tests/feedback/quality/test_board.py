"""The board: Bradley-Terry over the project's models, against the package choix."""

import numpy as np
import pytest
from pair_payloads import BOTH_BAD, TIE, A, B

from openpalm.feedback.judgements import submission
from openpalm.feedback.models import Candidate, ModelVersion, User


@pytest.fixture
def models(project):
    names = ("small", "middle", "large")
    return [ModelVersion.objects.create(project=project, name=name) for name in names]


@pytest.fixture
def compared(make_item):
    """compared(n, a, b): an item with an answer of each model."""

    def make(n, a, b, answers=("x", "y"), **fields):
        item = make_item(f"q{n}", *answers, needed=9, **fields)
        for place, model in zip(item.places.order_by("position"), (a, b), strict=True):
            Candidate.objects.filter(pk=place.candidate_id).update(model=model)
        return item

    return make


def strengths(board, which="plain"):
    return {row["model"]: row["value"] for row in board[which]["strengths"]}


def test_strengths_are_those_of_choix(models, member, compared, judge, figures):
    choix = pytest.importorskip("choix")
    ann = member("ann")
    wins = {(0, 1): 3, (1, 0): 5, (0, 2): 2, (2, 0): 6, (1, 2): 3, (2, 1): 4}
    games = []
    for (i, j), number in wins.items():
        for _ in range(number):
            # The winner is candidate 0 or 1 in turn.
            swapped = len(games) % 2
            a, b = (models[j], models[i]) if swapped else (models[i], models[j])
            judge(ann, compared(len(games), a, b), B if swapped else A)
            games.append((i, j))
    theirs = choix.ilsr_pairwise(3, games)
    board = figures("board")["person"]
    ours = strengths(board)
    assert [ours[m.name] for m in models] == pytest.approx(list(theirs - np.mean(theirs)))
    assert board["ids"] == {model.name: model.pk for model in models}
    assert board["plain"]["clusters"] == len(games)


def test_outcomes_and_what_says_nothing(models, member, compared, make_item, judge, figures):
    ann, (small, middle, _) = member("ann"), models
    for n, payload in enumerate([A, B, TIE, BOTH_BAD, A]):
        judge(ann, compared(n, small, middle), payload)
    judge(ann, compared(10, small, small), A)
    judge(ann, make_item("unknown", "x", "y"), A)
    board = figures("board")["person"]
    assert board["plain"]["outcomes"] == {"a": 2, "b": 1, "tie": 1, "both_bad": 1}
    assert (board["one_model"], board["unknown"]) == (1, 1)


def test_groups_that_were_never_compared(project, models, member, compared, judge, figures):
    fourth = ModelVersion.objects.create(project=project, name="other")
    for n, payload in enumerate([A, B, A]):
        judge(member("ann"), compared(n, *models[:2]), payload)
        judge(member("ann"), compared(10 + n, models[2], fourth), payload)
    board = figures("board")["person"]["plain"]
    assert {row["model"]: row["group"] for row in board["strengths"]} == {
        "large": 0,
        "other": 0,
        "middle": 1,
        "small": 1,
    }
    assert any("never compared" in note for note in board["notes"])


def test_style_control_takes_length_out(models, member, compared, judge, figures):
    """The longer answer wins three times of four; the models are equal at equal length."""
    long, short, ann = models[0], models[1], member("ann")
    n = 0
    for a, b in ((long, short), (short, long)):
        for answers, given in (
            (("long words " * 9, "short"), [A, A, A, B]),
            (("short", "long words " * 9), [B, B, B, A]),
        ):
            # The "long" model writes the long answer twice as often.
            is_usual = (a is long) == (len(answers[0]) > len(answers[1]))
            for payload in given * (2 if is_usual else 1):
                judge(ann, compared(n, a, b, answers), payload)
                n += 1
    board = figures("board")["person"]
    assert strengths(board)[long.name] > 0.1
    assert strengths(board, "styled")[long.name] == pytest.approx(0, abs=1e-6)


def test_no_kind_of_author_moves_the_board_of_another(models, member, compared, judge, figures):
    ann, sim = member("ann"), member("sim", kind=User.Kind.SIMULATED)
    machine = member("judge", kind=User.Kind.MODEL)
    items = [compared(n, *models[:2]) for n in range(4)]
    for item, payload in zip(items, [A, A, A, B], strict=True):
        judge(ann, item, payload)
    before = figures("board")["person"]
    for item in items:
        judge(sim, item, B)
        judge(machine, item, B)
        judge(ann, item, B, repeat=1)
    gold = compared(9, *models[:2], purpose="gold", gold=A, gold_kind="compare")
    judge(ann, gold, B)
    submission.delete(judge(member("bea"), items[0], B).pk)
    found = figures("board")
    assert found["person"] == before
    assert found["simulated"]["plain"]["outcomes"]["b"] == 4


def test_rankings_count_every_pair(project, models, member, make_item, judge, figures):
    project.task = "ranking"
    project.save()
    for n, order in enumerate([[[2], [1], [0]], [[0], [1], [2]], [[2], [0, 1]]]):
        item = make_item(f"q{n}", "x", "y", "z")
        for place, model in zip(item.places.order_by("position"), models, strict=True):
            Candidate.objects.filter(pk=place.candidate_id).update(model=model)
        judge(member("ann"), item, {"order": order}, "rank")
    board = figures("board")["person"]["plain"]
    assert board["outcomes"] == {"a": 3, "b": 5, "tie": 1, "both_bad": 0}
    assert board["strengths"][0]["model"] == "large"
