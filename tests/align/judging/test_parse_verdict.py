"""Parsing of verdicts in the usual forms, and of replies without one."""

import pytest

from openpalm.align.judging.parse_verdict import parse_verdict


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("A", "A"),
        (" b.", "B"),
        ("(B)", "B"),
        ("**A**", "A"),
        ("`A`", "A"),
        ('"B"', "B"),
        ("[[A]]", "A"),
        ("My verdict is [[B]], since A rambles.", "B"),
        ("Answer: B", "B"),
        ("Answer: A", "A"),
        ("**Answer:** B", "B"),
        ("Final answer: **A**", "A"),
        ("The better answer is B.", "B"),
        ("As a judge I choose A", "A"),
        ("I prefer response B because answer A is rude.", "B"),
        ("Answer A says little. Answer B is better.", "B"),
        ("Option A", "A"),
        ("A is better than B", "A"),
        ("A, because B is wrong.", "A"),
        ("B\n\nIt names the source; A does not.", "B"),
        ('{"verdict": "A"}', "A"),
        ('{"reason": "B is rude", "winner": "A"}', "A"),
        ('```json\n{"choice": "B"}\n```', "B"),
        ('{"preferred_answer": "B", "score": 3}', "B"),
        ("<think>A looks good. So A? No.</think>B", "B"),
        ("so A or B ...</think>\n\nAnswer: A", "A"),
        ("\\boxed{B}", "B"),
    ],
)
def test_a_verdict_is_read(reply, label):
    assert parse_verdict(reply, ("A", "B")) == "AB".index(label)
    assert parse_verdict(reply.replace("\r", ""), ("B", "A")) == "BA".index(label)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Both are equally good.",
        "Neither A nor B.",
        "Neither",
        "A good answer names its source.",
        "As a judge I must be fair.",
        "All answers are fine.",
        "Answer A is polite, answer B is short.",
        "Not A.",
        "[[A]] or [[B]]",
        "[[C]]",
        "<think>A is better, so",
        '{"verdict": "tie"}',
        '{"A": 3, "B": 4}',
        "[1]",
        "I can't decide between A and B",
    ],
)
def test_no_verdict_is_none(reply):
    assert parse_verdict(reply, ("A", "B")) is None


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("Yes", 0),
        ("no.", 1),
        ("No, it does not break the rule.", 1),
        ("Answer: yes", 0),
        ("I know nothing", None),
        ("Yesterday", None),
    ],
)
def test_words_count_in_any_case(reply, index):
    assert parse_verdict(reply, ("yes", "no")) == index
