"""Records of a board of models: the comparisons that go in, the strengths that come out."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from openpalm.feedback.statistics.intervals import Estimate, t_quantile

Outcome = Literal["a", "b", "tie", "both_bad"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Comparison(NamedTuple):
    """A judgement, or a sum of judgements that are alike in every field."""

    a: str
    """model"""
    b: str
    outcome: Outcome
    """who was better; a tie; or both bad"""
    number: float = 1
    style: tuple[float, ...] = ()
    """differences a - b, see style.style_difference"""
    prompt: Hashable = None
    """judgements of one prompt are one cluster; None: each judgement is independent"""
    labeler: Hashable = None


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Many comparisons as arrays of n rows; the fields are those of Comparison."""

    models: list[str]
    """sorted by name"""
    a: np.ndarray
    """indices of models"""
    b: np.ndarray
    outcome: np.ndarray
    """indices in OUTCOMES"""
    number: np.ndarray
    style: np.ndarray
    """(n, features)"""
    prompt: np.ndarray
    """numbers of the clusters; -1: none"""
    labeler: np.ndarray

    def __len__(self) -> int:
        return len(self.a)

    def chosen(self, rows: np.ndarray) -> "Comparisons":
        names = ("a", "b", "outcome", "number", "style", "prompt", "labeler")
        return Comparisons(self.models, *(getattr(self, name)[rows] for name in names))

    def without_style(self) -> "Comparisons":
        return replace(self, style=self.style[:, :0])

    @classmethod
    def of(cls, rows: Iterable[Comparison], features: Sequence[str]) -> "Comparisons":
        """Raises ValueError for a comparison of a model with itself, an unknown outcome or a
        wrong number of style values."""
        known = list(rows)
        for row in known:
            if row.a == row.b:
                raise ValueError(f"a comparison of {row.a!r} with itself; name two models")
            if row.outcome not in OUTCOMES:
                names = ", ".join(OUTCOMES)
                raise ValueError(f"outcome {row.outcome!r}; it must be one of {names}")
            if len(row.style) != len(features):
                raise ValueError(f"style {row.style} does not have a value for each of {features}")
        models = sorted({model for row in known for model in (row.a, row.b)})
        place = {model: n for n, model in enumerate(models)}
        style = np.array([row.style for row in known], dtype=float)
        return cls(
            models,
            np.array([place[row.a] for row in known], dtype=np.intp),
            np.array([place[row.b] for row in known], dtype=np.intp),
            np.array([OUTCOMES.index(row.outcome) for row in known], dtype=np.intp),
            np.array([row.number for row in known], dtype=float),
            style.reshape(len(known), len(features)),
            _numbered(row.prompt for row in known),
            _numbered(row.labeler for row in known),
        )


def _numbered(names: Iterable[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    found = [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Strength:
    model: str
    group: int
    """strengths of different groups cannot be compared"""
    value: float
    """natural logarithm of the odds against an average model of the group"""
    low: float | None
    """None: the data do not determine it"""
    high: float | None
    comparisons: float
    clusters: int
    """prompts (or labelers, if fewer) that the interval rests on; Student's t has one less"""
    bounded: bool
    """False: some models of the group never lost or tied against the rest; see the notes"""


@dataclass(frozen=True, slots=True)
class StyleCoefficient:
    feature: str
    value: float
    """change of the log-odds for one standard deviation of the style difference"""
    low: float | None
    high: float | None
    standard_deviation: float
    """root mean square of the style difference"""


@dataclass(frozen=True, slots=True)
class Board:
    """Result of `fit`, models by falling strength within each group, the largest group first."""

    strengths: tuple[Strength, ...]
    style: tuple[StyleCoefficient, ...]
    outcomes: dict[str, float]
    """number of comparisons with each outcome, also of those left out"""
    ties: str
    both_bad: str
    tie_parameter: float | None
    """Davidson's: P(tie) of equal models is e^tie / (2 + e^tie)"""
    clusters: int
    """independent units that the intervals rest on"""
    converged: bool
    notes: tuple[str, ...]
    _covariance: np.ndarray = field(repr=False)
    """of the strengths in the order of `strengths`, (m, m)"""
    _level: float = field(repr=False)

    def __getitem__(self, model: str) -> Strength:
        return self.strengths[self._place(model)]

    def _place(self, model: str) -> int:
        return [strength.model for strength in self.strengths].index(model)

    def win_probability(self, a: str, b: str, level: float | None = None) -> Estimate | None:
        """Expected score of model a against b at equal style, a tie counting half.

        None if they are of different groups or the data do not determine it. The interval is that
        of the strength difference, transformed; `level` is that of the fit if not given.
        """
        i, j = self._place(a), self._place(b)
        one, two = self.strengths[i], self.strengths[j]
        if one.group != two.group or one.low is None or two.low is None:
            return None
        v = self._covariance
        quantile = t_quantile(min(one.clusters, two.clusters) - 1, level or self._level)
        half = quantile * math.sqrt(max(0.0, v[i, i] + v[j, j] - 2 * v[i, j]))
        d = one.value - two.value
        return Estimate(*(self._expected_score(x) for x in (d, d - half, d + half)))

    def _expected_score(self, d: float) -> float:
        if self.tie_parameter is None:
            return 0.5 * (1 + math.tanh(d / 2))
        # (e^(d/2) + e^tie / 2) / (e^(d/2) + e^(-d/2) + e^tie)
        win, lose, tie = math.exp(d / 2), math.exp(-d / 2), math.exp(self.tie_parameter)
        return (win + tie / 2) / (win + lose + tie)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of all that a page shows, with the pairs' win probabilities."""
        models = [strength.model for strength in self.strengths]
        pairs = [(a, b, self.win_probability(a, b)) for a in models for b in models if a != b]
        return {
            name: value
            for name, value in asdict(self).items()
            if not name.startswith("_") and name != "notes"
        } | {
            "notes": list(self.notes),
            "win_probabilities": [[a, b, *found] for a, b, found in pairs if found is not None],
        }
