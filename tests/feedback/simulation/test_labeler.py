"""Labelers judge by their taste, slip as often as they should, and mind no side of the screen."""

import pytest

from openpalm.data.rows.payloads import is_payload
from openpalm.errors import DataError
from openpalm.feedback.simulation.labeler import Labeler
from openpalm.feedback.simulation.tastes import TASTES, mean_utility

QUESTION = "What is a comet?"
GOOD = "Sure! A comet is a ball of ice and dust that circles the sun."
POOR = "Whatever. Whatever."


def labeler(noise=0.0, seed="1"):
    return Labeler(TASTES["exact"], seed, noise)


def test_every_taste_prefers_a_good_answer():
    assert all(t.utility(QUESTION, GOOD) > t.utility(QUESTION, POOR) for t in TASTES.values())
    mean = sum(t.utility(QUESTION, GOOD) for t in TASTES.values()) / 3
    assert mean_utility(QUESTION, GOOD) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("kind", "replies"),
    [
        ("compare", (GOOD, POOR)),
        ("rank", (GOOD, POOR, "No.")),
        ("rate", (GOOD,)),
        ("thumb", (POOR,)),
    ],
)
def test_payloads_have_the_form_of_their_kind(kind, replies):
    for seed in range(40):
        payload = labeler(0.5, str(seed)).judge(kind, QUESTION, replies, axes=["truth"])
        assert is_payload(kind, payload, len(replies)), payload


def test_without_noise_the_better_side_wins_on_either_side():
    assert labeler().judge("compare", QUESTION, (GOOD, POOR), strengths=2) == {
        "better": 0,
        "worse": 1,
        "strength": 2,
    }
    assert labeler().judge("compare", QUESTION, (POOR, GOOD))["better"] == 1
    assert labeler().judge("compare", QUESTION, (GOOD, GOOD)) == {"tie": [0, 1]}
    assert labeler().judge("compare", QUESTION, (POOR, POOR)) == {"both_bad": [0, 1]}


@pytest.mark.parametrize("replies", [(GOOD, POOR), (GOOD + " Yes.", GOOD + " Yep.")])
def test_a_slip_names_the_same_reply_whatever_the_order(replies):
    for seed in map(str, range(30)):
        first = labeler(0.5, seed).judge("compare", QUESTION, replies)
        second = labeler(0.5, seed).judge("compare", QUESTION, replies[::-1])
        assert first.get("better") == second.get("worse")


def test_slips_are_as_frequent_as_the_noise():
    payloads = [labeler(0.15, str(n)).judge("compare", QUESTION, (GOOD, POOR)) for n in range(2000)]
    # Four standard deviations of a share of 2000 draws.
    assert sum(p["better"] for p in payloads) / 2000 == pytest.approx(0.15, abs=0.032)


def test_labelers_write_no_text():
    with pytest.raises(DataError, match="write no text"):
        labeler().judge("edit", QUESTION, (GOOD,))
