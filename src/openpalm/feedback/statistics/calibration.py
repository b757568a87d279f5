"""Calibration of a reward model: do its probabilities match the choices of people?

A reward model says P(a is better than b) = sigmoid(reward_a - reward_b). Which completion is
called a is arbitrary, so reliability is of the confidence, the larger of p and 1 - p, and of the
share of people who agreed with the model (Guo et al. 2017, "On Calibration of Modern Neural
Networks", section 2). A tie is half a choice of each side.

Agreement of people with each other limits the accuracy, but is not the limit itself: whoever
knows the majority agrees with a person more often than another person does. `accuracy_limit`.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from openpalm.feedback.statistics.intervals import LEVEL, Estimate, means_of_units, wilson_of_means

BINS = 10
_EPSILON = 1e-12
"""probabilities are kept this far from 0 and 1 in the log loss, so that it stays finite"""


class Bin(NamedTuple):
    """Judgements with a confidence from `low` to `high`."""

    low: float
    high: float
    judgements: int
    mean_confidence: float | None
    """None in an empty bin"""
    agreement: Estimate | None
    """share of people's choices that are the model's"""


@dataclass(frozen=True, slots=True)
class Calibration:
    judgements: int
    ties: int
    accuracy: Estimate | None
    """share of decided judgements with the higher reward for the chosen side; equal rewards half"""
    expected_error: float
    """expected calibration error: mean distance of confidence and agreement over the bins"""
    brier: float
    """mean squared error of the probabilities (Brier 1950); 1/4 for always saying 1/2"""
    log_loss: float
    """mean negative log-likelihood in nats; 0.693 for always saying 1/2"""
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        bins = [one._asdict() for one in self.bins]
        for one in bins:
            one["agreement"] = one["agreement"] and one["agreement"]._asdict()
        accuracy = self.accuracy and self.accuracy._asdict()
        return plain | {"bins": bins, "accuracy": accuracy}


def calibration(
    probabilities: Sequence[float] | np.ndarray,
    choices: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | np.ndarray | None = None,
    *,
    bins: int = BINS,
    level: float = LEVEL,
) -> Calibration | None:
    """Accuracy, calibration error, Brier score and log loss; None without judgements.

    probabilities (n,): the model's P(a is better). choices (n,): 1 if the person chose a, 0 if b,
    0.5 for a tie. prompts (n,): judgements of one prompt are one unit of the intervals; None: all
    judgements are independent. Bins are of equal width from confidence 1/2 to 1. Raises ValueError
    for probabilities outside 0 to 1 and other choices.
    """
    p, y = np.asarray(probabilities, dtype=float), np.asarray(choices, dtype=float)
    _check(p, y)
    if not len(p):
        return None
    units = np.arange(len(p)) if prompts is None else _numbered(prompts)
    confidence = np.maximum(p, 1 - p)
    agreed = np.where(p >= 0.5, y, 1 - y)
    place = np.minimum(((2 * confidence - 1) * bins).astype(int), bins - 1)
    decided = y != 0.5
    right = np.where(p == 0.5, 0.5, agreed)[decided]
    gap = np.abs(np.bincount(place, agreed - confidence, bins)).sum()
    clipped = p.clip(_EPSILON, 1 - _EPSILON)
    return Calibration(
        judgements=len(p),
        ties=int((~decided).sum()),
        accuracy=wilson_of_means(means_of_units(units[decided], right), level=level),
        expected_error=float(gap / len(p)),
        brier=float(((p - y) ** 2).mean()),
        log_loss=float(-(y * np.log(clipped) + (1 - y) * np.log1p(-clipped)).mean()),
        bins=tuple(_bin(n, bins, confidence, agreed, units, place, level) for n in range(bins)),
    )


def accuracy_limit(agreement: Estimate) -> Estimate:
    """Bound of the accuracy that any model can reach, from people's raw agreement.

    `agreement` is of two people on decided pairs. If a share p of people chooses a, two of them
    agree with probability p^2 + (1 - p)^2 = A and the best prediction is right with probability
    max(p, 1 - p) = (1 + sqrt(2 A - 1)) / 2. This is concave in A, so by Jensen's inequality the
    formula of the mean agreement bounds the mean over pairs. Equal only if all pairs are as hard.
    """
    return Estimate(*((1 + math.sqrt(max(0.0, 2 * a - 1))) / 2 for a in agreement))


def _check(p: np.ndarray, y: np.ndarray) -> None:
    if p.shape != y.shape or p.ndim != 1:
        raise ValueError(f"{p.shape} probabilities and {y.shape} choices; give one for each")
    # Negated, so that nan is refused too.
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities must be from 0 to 1")
    if not np.isin(y, (0, 0.5, 1)).all():
        raise ValueError("choices must be 1 (a), 0 (b) or 0.5 (tie)")


def _numbered(prompts: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    if isinstance(prompts, np.ndarray):
        return np.unique(prompts, return_inverse=True)[1]
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def _bin(
    number: int,
    bins: int,
    confidence: np.ndarray,
    agreed: np.ndarray,
    units: np.ndarray,
    place: np.ndarray,
    level: float,
) -> Bin:
    here = place == number
    agreement = wilson_of_means(means_of_units(units[here], agreed[here]), level=level)
    return Bin(
        low=0.5 + number / (2 * bins),
        high=0.5 + (number + 1) / (2 * bins),
        judgements=int(here.sum()),
        mean_confidence=float(confidence[here].mean()) if here.any() else None,
        agreement=agreement,
    )
