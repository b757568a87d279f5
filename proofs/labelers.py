"""Simulated labelers of known taste, who judge two replies to a question with known noise.

A taste is a weighting of readable qualities of a short reply. What the labelers agree on, the mean
of their utilities, is the truth that a proof compares with; nothing that trains sees it.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

NOISE = 0.15
"""Share of judgements in which a labeler names the wrong side."""
TIE = 0.25
"""Utilities closer than this are a tie."""
BAD = -0.5
"""Below this utility a reply is bad."""
WORDS = (9, 22)
"""Least and most words of a reply of comfortable length."""
GREETINGS = re.compile(r"\b(sure|happy|good question|of course|gladly|welcome|thanks)\b", re.I)
RUDE = re.compile(r"\b(not again|if you must|obviously|whatever|so what)\b", re.I)

Side = Literal["first", "second", "tie", "both bad"]


def qualities(question: str, reply: str) -> dict[str, float]:
    """Each 1 where the reply has the quality, 0 where not."""
    subject = question.rstrip("?.").rsplit(" ", 1)[-1]
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", reply.strip()) if s]
    bare = [s.rstrip(".!?").lower() for s in sentences]
    least, most = WORDS
    return {
        "subject": float(re.search(rf"\b{re.escape(subject)}\b", reply, re.I) is not None),
        "ends": float(reply.rstrip().endswith((".", "!", "?"))),
        "friendly": float(GREETINGS.search(reply) is not None),
        "rude": float(RUDE.search(reply) is not None),
        "figures": float(re.search(r"\d", reply) is not None),
        "comfortable": float(least <= len(reply.split()) <= most),
        "repeats": float(len({*bare}) < len(bare)),
    }


@dataclass(frozen=True)
class Taste:
    """Weights of the qualities; a utility is their sum, less what an average reply gets."""

    name: str
    weights: dict[str, float]

    def utility(self, question: str, reply: str) -> float:
        found = qualities(question, reply)
        return sum(w * (found[quality] - 0.5) for quality, w in self.weights.items())


TASTES = (
    Taste(
        "exact",
        {
            "subject": 1.6,
            "ends": 1.2,
            "friendly": 0.4,
            "rude": -0.4,
            "figures": 0.8,
            "comfortable": 0.4,
            "repeats": -1.0,
        },
    ),
    Taste(
        "warm",
        {
            "subject": 1.2,
            "ends": 0.6,
            "friendly": 1.2,
            "rude": -1.2,
            "figures": 0.2,
            "comfortable": 0.4,
            "repeats": -0.6,
        },
    ),
    Taste(
        "brief",
        {
            "subject": 1.2,
            "ends": 1.2,
            "friendly": 0.4,
            "rude": -0.6,
            "figures": 0.2,
            "comfortable": 1.2,
            "repeats": -1.4,
        },
    ),
)


def truth(question: str, reply: str) -> float:
    """The mean of the labelers' utilities."""
    return sum(taste.utility(question, reply) for taste in TASTES) / len(TASTES)


@dataclass(frozen=True)
class Judgement:
    """What a labeler answers: the better side or none, and how sure (1 to 3)."""

    side: Side
    strength: int = 1

    @property
    def share(self) -> float:
        """Of the first side: 1 where it won, 1/2 where neither did."""
        return {"first": 1.0, "second": 0.0}.get(self.side, 0.5)

    def payload(self) -> dict[str, Any]:
        """Of a preference record of kind compare."""
        if self.side == "tie":
            return {"tie": [0, 1]}
        if self.side == "both bad":
            return {"both_bad": [0, 1]}
        better = 0 if self.side == "first" else 1
        return {"better": better, "worse": 1 - better, "strength": self.strength}


@dataclass
class Labeler:
    """A taste with a hand that slips: NOISE of the answers name the wrong side."""

    taste: Taste
    drawn: random.Random
    noise: float = NOISE

    def judge(self, question: str, first: str, second: str) -> Judgement:
        utilities = [self.taste.utility(question, reply) for reply in (first, second)]
        difference = utilities[0] - utilities[1]
        slips = self.drawn.random() < self.noise
        if abs(difference) < TIE:
            if slips:
                return Judgement(self.drawn.choice(("first", "second")))
            return Judgement("both bad" if max(utilities) < BAD else "tie")
        strength = 1 + (abs(difference) > 1) + (abs(difference) > 2)
        return Judgement("first" if (difference > 0) != slips else "second", strength)


def labelers(seed: int, tastes: Sequence[Taste] = TASTES) -> list[Labeler]:
    """One of each taste; what each does depends on the seed alone."""
    return [Labeler(taste, random.Random(f"{taste.name} {seed}")) for taste in tastes]
