"""Token F1 against examples computed by hand."""

import random

import pytest

from openpalm.evaluate.token_f1 import token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "the cat sat down", 6 / 7),  # precision 1, recall 3/4
        ("cat", "the cat sat down", 2 / 5),  # precision 1, recall 1/4
        ("dog", "the cat", 0.0),
        ("the the the", "the", 1 / 2),  # a word counts as often as both have it
        ("a b", "b c", 1 / 2),
        ("Copy, the TREE!", "copy the tree", 1.0),  # case and punctuation do not count
        ("", "", 1.0),
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("... !", "?", 1.0),  # no words on either side
        ("café über", "Café", 2 / 3),
    ],
)
def test_worked_examples(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_properties():
    rng = random.Random(0)
    for _ in range(500):
        left, right = (rng.choices("abcdef", k=rng.randint(0, 6)) for _ in range(2))
        score = token_f1(" ".join(left), " ".join(right))
        assert 0 <= score <= 1
        assert score == pytest.approx(token_f1(" ".join(right), " ".join(left)))
        rng.shuffle(left)
        assert score == pytest.approx(token_f1(" ".join(left), " ".join(right)))
        assert (score == 1) == (sorted(left) == sorted(right))
        assert (score == 0) == (not set(left) & set(right) and left != right)
