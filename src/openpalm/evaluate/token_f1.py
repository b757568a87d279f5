"""How close answers come to references: token F1, as reading-comprehension tests measure it."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1] (Rajpurkar et al. 2016, SQuAD)."""
    given, wanted = _words(answer), _words(reference)
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return float(given == wanted)
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def mean_token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """The mean over all answers."""
    return fmean(token_f1(*pair) for pair in zip(answers, references, strict=True))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
