"""Token F1 of a completion against a reference, as in SQuAD."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean


def token_f1(completion: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1] (Rajpurkar et al. 2016, SQuAD)."""
    found, expected = _words(completion), _words(reference)
    common = sum((Counter(found) & Counter(expected)).values())
    if not common:
        return float(found == expected)
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def mean_token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean over all answers."""
    return fmean(token_f1(*pair) for pair in zip(answers, references, strict=True))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
