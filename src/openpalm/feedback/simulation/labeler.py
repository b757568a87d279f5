"""A simulated labeler: a known taste and random errors. Judges with payloads of records."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openpalm.errors import DataError
from openpalm.feedback.simulation.tastes import Taste

NOISE = 0.15
"""share of judgements in which a labeler names the wrong side"""
TIE = 0.25
"""utilities closer than this are a tie"""
BAD = -0.5
"""below this utility a reply is bad"""


@dataclass(frozen=True)
class Labeler:
    """`judge` depends on the seed and on what is judged alone, not on the order of the items."""

    taste: Taste
    seed: str
    noise: float = NOISE

    def judge(
        self,
        kind: str,
        question: str,
        replies: Sequence[str],
        *,
        strengths: int = 3,
        axes: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The payload of this kind; numbers the replies from 0. Raises DataError for kinds that
        write text."""
        drawn = random.Random("\0".join((self.seed, kind, question, *sorted(replies))))
        slips = drawn.random() < self.noise
        utilities = [self.taste.utility(question, reply) for reply in replies]
        match kind:
            case "compare":
                return self._compare(utilities, replies, slips, strengths, drawn)
            case "rank":
                return _rank(utilities, slips)
            case "rate":
                value = min(5, max(1, round(3 + utilities[0])))
                value = 6 - value if slips else value
                return {"candidate": 0, "ratings": dict.fromkeys(axes, value)}
            case "thumb":
                return {"candidate": 0, "up": (utilities[0] > 0) != slips}
        raise DataError(f"simulated labelers cannot do the kind {kind}: they write no text")

    def _compare(
        self,
        utilities: list[float],
        replies: Sequence[str],
        slips: bool,
        strengths: int,
        drawn: random.Random,
    ) -> dict[str, Any]:
        difference = utilities[0] - utilities[1]
        if abs(difference) < TIE:
            if not slips:
                return {"both_bad" if max(utilities) < BAD else "tie": [0, 1]}
            # By the text, so that the sides of the screen do not matter.
            named = drawn.choice(sorted(replies))
            better = replies.index(named)
            return {"better": better, "worse": 1 - better, "strength": 1}
        better = 0 if (difference > 0) != slips else 1
        strength = min(strengths, 1 + (abs(difference) > 1) + (abs(difference) > 2))
        return {"better": better, "worse": 1 - better, "strength": strength}


def _rank(utilities: list[float], slips: bool) -> dict[str, Any]:
    """The best first, equal ones together; a slip swaps the first two groups."""
    groups = [
        [i for i, u in enumerate(utilities) if u == value]
        for value in sorted(set(utilities), reverse=True)
    ]
    if slips and len(groups) > 1:
        groups[0], groups[1] = groups[1], groups[0]
    return {"order": groups}
