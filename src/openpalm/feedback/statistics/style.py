"""Style of a completion: length and markdown, as covariates of a comparison.

Follows the style control of the public arena (Li, Angelopoulos and Chiang 2024, "Does style
matter? Disentangling style and substance in Chatbot Arena"), with characters instead of tokens as
length, because no tokenizer is at hand here.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEATURES = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"^(```|~~~).*?(^\1|\Z)", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(r"^ {0,3}#{1,6}[ \t]", re.MULTILINE)
_LIST = re.compile(r"^[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+\*\*|__(?=\S)[^_\n]+__")


class Style(NamedTuple):
    length: int
    """characters"""
    headers: int
    lists: int
    """list items, numbered or not"""
    bold: int


def style_of(text: str) -> Style:
    """Counts of a markdown text; what is inside code blocks counts as length only."""
    prose = _CODE.sub("", text)
    marks = (len(pattern.findall(prose)) for pattern in (_HEADER, _LIST, _BOLD))
    return Style(len(text), *marks)


def style_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    """(a - b) / (a + b) of each count, between -1 and 1; 0 where both are 0.

    The difference changes its sign when the sides are swapped, so it fits a model of comparisons.
    """
    return tuple((x - y) / (x + y) if x + y else 0.0 for x, y in zip(a, b, strict=True))


def style_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`style_difference` of many pairs, (n, features)."""
    sums = a + b
    return np.divide(a - b, sums, where=sums > 0, out=np.zeros(sums.shape))
