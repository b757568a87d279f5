"""Known tastes as functions of the text, so that the right choice is known.

A taste weighs qualities that anyone can check in a short reply. The mean of the utilities of
several labelers is the truth to compare with; nothing that trains may see it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORDS = (9, 22)
"""least and most words of a reply of comfortable length"""
GREETINGS = re.compile(r"\b(sure|happy|good question|of course|gladly|welcome|thanks)\b", re.I)
RUDE = re.compile(r"\b(not again|if you must|obviously|whatever|so what)\b", re.I)


def qualities(question: str, reply: str) -> dict[str, float]:
    """Each quality is 1 where the reply has it, 0 where not."""
    subject = question.rstrip("?. ").rsplit(" ", 1)[-1]
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", reply.strip()) if s]
    bare = {s.rstrip(".!?").lower() for s in sentences}
    least, most = WORDS
    return {
        "subject": float(re.search(rf"\b{re.escape(subject)}\b", reply, re.I) is not None),
        "ends": float(reply.rstrip().endswith((".", "!", "?"))),
        "friendly": float(GREETINGS.search(reply) is not None),
        "rude": float(RUDE.search(reply) is not None),
        "figures": float(re.search(r"\d", reply) is not None),
        "comfortable": float(least <= len(reply.split()) <= most),
        "repeats": float(len(bare) < len(sentences)),
    }


@dataclass(frozen=True)
class Taste:
    """Weights of the qualities. The utility of a reply is their sum; half of all is the zero."""

    name: str
    weights: dict[str, float]

    def utility(self, question: str, reply: str) -> float:
        found = qualities(question, reply)
        return sum(weight * (found[name] - 0.5) for name, weight in self.weights.items())


QUALITIES = ("subject", "ends", "friendly", "rude", "figures", "comfortable", "repeats")
TASTES = {
    name: Taste(name, dict(zip(QUALITIES, weights, strict=True)))
    for name, weights in (
        ("exact", (1.6, 1.2, 0.4, -0.4, 0.8, 0.4, -1.0)),
        ("warm", (1.2, 0.6, 1.2, -1.2, 0.2, 0.4, -0.6)),
        ("brief", (1.2, 1.2, 0.4, -0.6, 0.2, 1.2, -1.4)),
    )
}


def mean_utility(question: str, reply: str, tastes: Iterable[Taste] = TASTES.values()) -> float:
    """The truth that labelers of these tastes agree on."""
    among: Sequence[Taste] = list(tastes)
    return sum(taste.utility(question, reply) for taste in among) / len(among)
