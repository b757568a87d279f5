"""How close answers come to references: token F1, as reading-comprehension tests measure it."""

import re
from collections import Counter


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1] (Rajpurkar et al. 2016, SQuAD)."""
    given, wanted = _words(answer), _words(reference)
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return float(given == wanted)
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
