"""Token F1 of a completion against a reference, as in SQuAD."""

import re
from collections import Counter


def token_f1(completion: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1] (Rajpurkar et al. 2016, SQuAD)."""
    found, expected = _words(completion), _words(reference)
    common = sum((Counter(found) & Counter(expected)).values())
    if not common:
        return float(found == expected)
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
