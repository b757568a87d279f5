"""Rewards for `openpalm ppo` and `openpalm grpo`: --reward examples/rewards.py:NAME.

Each is called with the last question, the answer's text and the prompt's row of the data, and
returns a number. Import what only one of them needs inside of it.
"""

from functools import cache
from typing import Any


def vader(prompt: str, answer: str, row: dict[str, Any]) -> float:
    """How positive the answer is, -1 to 1: the compound score of VADER (Hutto and Gilbert 2014).

    Needs `pip install vaderSentiment`.
    """
    return _analyser().polarity_scores(answer)["compound"]


def even_bytes(prompt: str, answer: str, row: dict[str, Any]) -> float:
    """Even bytes of an answer, as a share of 12: the even ids, where tokens are bytes."""
    return sum(byte % 2 == 0 for byte in answer.encode()) / 12


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
