"""Batch shape: how a step's sequences are cut into microbatches, and the batch-size ramp."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from openpalm.base.settings import check

if TYPE_CHECKING:
    from fractions import Fraction

_STAGE = re.compile(r"([1-9]\d{0,3}/[1-9]\d{0,3})@(0?\.\d{1,9})")
"""a stage of a ramp: SHARE@UNTIL"""


@dataclass(frozen=True)
class Ramp:
    """Batch-size ramp: each stage takes a share of the whole batch until a share of the steps."""

    stages: "tuple[tuple[Fraction, float], ...]" = ()

    @classmethod
    def parse(cls, text: str | None) -> "Ramp":
        """Reads `1/4@0.1,1/2@0.3`. Raises SettingsError unless both sides rise and stay below 1."""
        # Not at the top: --help reads this module and makes no ramp.
        from fractions import Fraction

        parts = [] if text is None else [_STAGE.fullmatch(part) for part in text.split(",")]
        stages = [(Fraction(p[1]), float(p[2])) if p else (Fraction(0), 0.0) for p in parts]
        rising = all(
            a < b for side in zip(*stages, strict=True) for a, b in pairwise((0, *side, 1))
        )
        wanted = "SHARE@UNTIL, both rising and between 0 and 1, such as 1/4@0.1,1/2@0.3"
        check(rising, "batch_ramp", text, wanted)
        return cls(tuple(stages))

    def share(self, step: int, steps: int) -> "Fraction":
        """Share of the whole batch that `step` (from 1) of `steps` takes."""
        from fractions import Fraction

        reached = (share for share, until in self.stages if step <= round(until * steps))
        return next(reached, Fraction(1))

    @property
    def mean(self) -> float:
        """Mean share over all steps."""
        ends = [0.0, *(until for _, until in self.stages), 1.0]
        shares = [*(float(share) for share, _ in self.stages), 1.0]
        pieces = zip(shares, pairwise(ends), strict=True)
        return sum(share * (end - start) for share, (start, end) in pieces)


@dataclass(frozen=True)
class BatchShape:
    """A step of one process: `accumulation` microbatches of `rows` sequences.

    Every process that reads data of its own has the same shape; together they make the batch.
    """

    sequence_length: int
    rows: int
    accumulation: int
    ramp: Ramp = Ramp()
    """ramp of the number of microbatches; the other fields describe a whole batch"""
    processes: int = 1
    """processes that read different rows"""
    rank: int = 0
    """number of this process among them"""

    @property
    def sequences(self) -> int:
        """Sequences per step and process."""
        return self.rows * self.accumulation

    @property
    def global_sequences(self) -> int:
        """Sequences per step, of all processes."""
        return self.sequences * self.processes

    @property
    def microbatches(self) -> int:
        """Microbatches per step, of all processes."""
        return self.accumulation * self.processes
