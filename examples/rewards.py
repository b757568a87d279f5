"""Reward functions for `openpalm ppo` and `openpalm grpo`: --reward examples/rewards.py:NAME.

A reward function takes the last user message, the text of the completion and the row of the prompt
in the data; it returns a number.
"""

from functools import cache
from typing import Any


def vader(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Sentiment of the completion, -1 to 1: VADER's compound score (Hutto and Gilbert 2014).

    Needs `pip install vaderSentiment`.
    """
    return _analyser().polarity_scores(completion)["compound"]


def even_bytes(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """Even bytes of the completion divided by 12: the even token ids of a byte tokenizer."""
    return sum(byte % 2 == 0 for byte in completion.encode()) / 12


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
