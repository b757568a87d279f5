"""Strengths of models from paired comparisons: Bradley-Terry with intervals and style control.

P(a is better than b) = sigmoid(strength_a - strength_b + style coefficients . style difference),
Bradley and Terry 1952, with covariates as Li, Angelopoulos and Chiang 2024 ("Does style matter?").
The strengths are then those of completions of equal style. Intervals are of the sandwich
estimator clustered by prompt (Liang and Zeger 1986), because judgements of one prompt are not
independent; with `cluster_labelers` also by labeler (Cameron, Gelbach and Miller 2011).

Ties and "both bad" are different judgements and are counted apart. Neither side is better in both,
so by default both are half a win of each side, as on the public arena. Draws come more often from
easy prompts than from equal models ("Drawing Conclusions from Draws", arXiv 2510.02306), so either
can be left out, and `ties="davidson"` gives ties a probability of their own.

What the data cannot tell is said in `Board.notes`: groups that were never compared, models
that won or lost everything, style features that cannot be told apart from the models.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from openpalm.feedback.statistics.board import (
    OUTCOMES,
    Board,
    Comparison,
    Comparisons,
    Strength,
    StyleCoefficient,
)
from openpalm.feedback.statistics.comparison_graph import groups_of, win_classes
from openpalm.feedback.statistics.intervals import LEVEL, t_quantile
from openpalm.feedback.statistics.pair_likelihood import (
    Fit,
    Rows,
    clusters_of_models,
    inverse,
    maximize,
    score_products,
)

Ties = Literal["half", "davidson", "leave_out"]
BothBad = Literal["as_tie", "leave_out"]
DECIDED = OUTCOMES.index("b")
"""the outcomes after it are draws"""
_STYLE_PRECISION = 0.25
"""of the prior that holds separating style coefficients: standard deviation 2"""


def fit(
    comparisons: Iterable[Comparison] | Comparisons,
    *,
    style_features: Sequence[str] = (),
    ties: Ties = "half",
    both_bad: BothBad = "as_tie",
    cluster_labelers: bool = False,
    level: float = LEVEL,
) -> Board:
    """Maximum likelihood strengths with intervals.

    `style_features` names the numbers in each comparison's `style`, in order. `cluster_labelers`
    widens the intervals to those of other labelers too, which needs several of them: with G
    labelers Student's t has at most G - 1 degrees of freedom. Raises ValueError for a comparison
    of a model with itself, an unknown outcome or a wrong number of style values.
    """
    data = comparisons
    if not isinstance(data, Comparisons):
        data = Comparisons.of(data, style_features)
    if not len(data):
        outcomes: dict[str, float] = dict.fromkeys(OUTCOMES, 0)
        empty = np.zeros((0, 0))
        return Board((), (), outcomes, ties, both_bad, None, 0, True, (), empty, level)
    return _Estimation(data, style_features, ties, both_bad, cluster_labelers, level).board()


class _Estimation:
    """One fit: usable rows, what holds strengths finite, covariance, and the notes about it."""

    def __init__(
        self,
        data: Comparisons,
        features: Sequence[str],
        ties: Ties,
        both_bad: BothBad,
        cluster_labelers: bool,
        level: float,
    ) -> None:
        self.data, self.features, self.level = data, features, level
        self.ties, self.both_bad, self.cluster_labelers = ties, both_bad, cluster_labelers
        self.notes: list[str] = []
        self.used = data.chosen(self._is_used(data.outcome))
        self.rows, self.kept, self.scale = self._arrays()
        self.groups, self.classes, added = self._structure()
        self.fit = self._maximize(self.rows.with_ties(added))

    def _is_used(self, outcome: np.ndarray) -> np.ndarray:
        left_out = np.zeros(len(outcome), bool)
        if self.both_bad == "leave_out":
            left_out |= outcome == OUTCOMES.index("both_bad")
        if self.ties == "leave_out":
            left_out |= outcome > DECIDED
        return ~left_out

    def _arrays(self) -> tuple[Rows, list[int], np.ndarray]:
        """Rows with standardised style, the features that vary, and their root mean squares."""
        used = self.used
        count, style = used.number, used.style
        scale = np.sqrt(count @ style**2 / max(1.0, count.sum()))
        kept = [k for k in range(len(self.features)) if scale[k] > 0]
        constant = [name for k, name in enumerate(self.features) if k not in kept]
        if constant:
            self.notes.append(f"No difference in {', '.join(constant)}: not controlled for.")
        rows = Rows(
            a=used.a,
            b=used.b,
            score=np.array([1.0, 0.0, 0.5, 0.5])[used.outcome],
            count=count,
            style=style[:, kept] / scale[kept],
            models=len(used.models),
            davidson=self._has_tie_parameter(),
        )
        return rows, kept, scale

    def _has_tie_parameter(self) -> bool:
        if self.ties != "davidson":
            return False
        drawn = self.used.outcome > DECIDED
        has_both = bool(drawn.any() and not drawn.all())
        if not has_both:
            self.notes.append(
                "Davidson's tie parameter needs ties and decided comparisons; ties count half."
            )
        return has_both

    def _structure(self) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Groups (m,), win classes (m,), and the pairs that get an added tie."""
        rows, m = self.rows, self.rows.models
        wins = np.bincount(rows.a * m + rows.b, rows.count * rows.score, m * m)
        losses = np.bincount(rows.b * m + rows.a, rows.count * (1 - rows.score), m * m)
        won = (wins + losses).reshape(m, m)
        groups, kinds = groups_of(won), win_classes(won)
        pairs = np.argwhere(np.triu(won + won.T) > 0)
        added = [(int(i), int(j)) for i, j in pairs if kinds[i] != kinds[j]]
        if groups.max() > 0:
            names = "; ".join(", ".join(self._names(groups == g)) for g in range(groups.max() + 1))
            self.notes.append(f"Groups never compared with each other: {names}.")
        if added:
            self.notes.append(self._note_of_added(won, kinds, len(added)))
        return groups, kinds, added

    def _names(self, chosen: np.ndarray) -> list[str]:
        return [model for model, is_in in zip(self.data.models, chosen, strict=True) if is_in]

    def _note_of_added(self, won: np.ndarray, kinds: np.ndarray, pairs: int) -> str:
        of_class = np.eye(kinds.max() + 1)[kinds]
        between = of_class.T @ won @ of_class
        np.fill_diagonal(between, 0)
        won_any, lost_any = between.sum(axis=1) > 0, between.sum(axis=0) > 0
        top = ", ".join(self._names((won_any & ~lost_any)[kinds]))
        bottom = ", ".join(self._names((lost_any & ~won_any)[kinds]))
        return (
            f"One-sided comparisons give no finite strengths ({top} never lost to the others, "
            f"{bottom} never won against them); one tie was added to {pairs} "
            f"pair{'s' * (pairs != 1)} to hold them."
        )

    def _maximize(self, rows: Rows) -> Fit:
        found = maximize(rows)
        if not found.converged and rows.style.shape[1]:
            self.notes.append(
                "Style separates the comparisons perfectly; a prior with standard deviation 2 "
                "holds its coefficients."
            )
            found = maximize(rows, _STYLE_PRECISION)
        if not found.converged:
            self.notes.append("The strengths did not converge; do not use them.")
        return found

    def board(self) -> Board:
        covariance, clusters, of_model = self._covariance()
        contrast = self._contrasts()
        values = contrast @ self.fit.parameters
        spread = contrast @ covariance @ contrast.T
        units = [*of_model, *[clusters] * (len(values) - len(of_model))]
        known = self._determined(contrast) & (np.array(units) > 1)
        quantiles = np.array([t_quantile(max(1, number - 1), self.level) for number in units])
        half = quantiles * np.sqrt(np.diag(spread).clip(min=0))
        ends = [
            (float(v - h), float(v + h)) if ok else (None, None)
            for v, h, ok in zip(values, half, known, strict=True)
        ]
        order = self._order(values)
        m = self.rows.models
        return Board(
            strengths=tuple(
                self._strength(i, float(values[i]), ends[i], of_model[i]) for i in order
            ),
            style=tuple(
                StyleCoefficient(
                    self.features[k], float(values[m + n]), *ends[m + n], float(self.scale[k])
                )
                for n, k in enumerate(self.kept)
            ),
            outcomes=self._outcomes(),
            ties=self.ties,
            both_bad=self.both_bad,
            tie_parameter=float(values[-1]) if self.rows.davidson else None,
            clusters=clusters,
            converged=self.fit.converged,
            notes=tuple(self.notes),
            _covariance=spread[np.ix_(order, order)],
            _level=self.level,
        )

    def _outcomes(self) -> dict[str, float]:
        numbers = np.bincount(self.data.outcome, self.data.number, len(OUTCOMES)).tolist()
        return dict(zip(OUTCOMES, numbers, strict=True))

    def _covariance(self) -> tuple[np.ndarray, int, list[int]]:
        """Sandwich covariance of the parameters (p, p), and clusters in all and of each model.

        Clusters of labelers count instead of those of prompts where they are fewer.
        """
        bread = inverse(self.fit.information)
        found = [self._scores(["prompt"])]
        if self.cluster_labelers and len(np.unique(self.used.labeler)) > 1:
            # Cameron et al. 2011: by prompt, plus by labeler, less by both.
            found += [self._scores(["labeler"]), self._scores(["prompt", "labeler"])]
            middle = found[0][0] + found[1][0] - found[2][0]
            sizes, vectors = np.linalg.eigh(middle)
            middle = vectors * sizes.clip(min=0) @ vectors.T
        else:
            middle = found[0][0]
            if self.cluster_labelers:
                self.notes.append("One labeler: the intervals say nothing about other labelers.")
        covariance = bread @ middle @ bread
        if (self.groups[:, None] == self.groups).sum() > (
            self.classes[:, None] == self.classes
        ).sum():
            # Residuals of one-sided comparisons are near 0, and so would be the sandwich.
            covariance = _larger(covariance, bread)
        touching = np.minimum.reduce([of_model for _, _, of_model in found[:2]])
        return covariance, min(number for _, number, _ in found[:2]), touching.tolist()

    def _scores(self, fields: Sequence[str]) -> tuple[np.ndarray, int, np.ndarray]:
        keys = np.stack([getattr(self.used, name) for name in fields], axis=1)
        none = (keys < 0).any(axis=1)
        clusters = np.full(len(keys), -1)
        axis = 0 if len(fields) > 1 else None
        clusters[~none] = np.unique(keys[~none], axis=axis, return_inverse=True)[1].ravel()
        # The terms of added ties, at the end, are no data.
        found = self.fit.terms.first(len(self.used))
        products, number = score_products(self.rows, found, clusters)
        return products, number, clusters_of_models(self.rows, clusters)

    def _contrasts(self) -> np.ndarray:
        """Strengths less the mean of their group; the other parameters as they are, (p, p)."""
        same = (self.groups[:, None] == self.groups).astype(float)
        contrast = np.eye(self.rows.parameters)
        contrast[: len(same), : len(same)] -= same / same.sum(axis=1)
        return contrast

    def _determined(self, contrast: np.ndarray) -> np.ndarray:
        """Which results the data determine: those without a part in a flat direction, (p,)."""
        sizes, vectors = np.linalg.eigh(self.fit.information)
        flat = vectors[:, sizes <= 1e-9 * max(sizes.max(), 1e-300)]
        known = np.asarray((np.abs(contrast @ flat) < 1e-5).all(axis=1))
        m = self.rows.models
        unknown = self._names(~known[:m]) + [
            self.features[k] for n, k in enumerate(self.kept) if not known[m + n]
        ]
        if unknown:
            self.notes.append(f"Models and style cannot be told apart: {', '.join(unknown)}.")
        return known

    def _order(self, values: np.ndarray) -> list[int]:
        sizes = np.bincount(self.groups)
        return sorted(
            range(self.rows.models),
            key=lambda i: (-sizes[self.groups[i]], self.groups[i], -values[i]),
        )

    def _strength(
        self, i: int, value: float, ends: tuple[float | None, float | None], clusters: int
    ) -> Strength:
        mates = self.groups == self.groups[i]
        touched = (self.rows.a == i) | (self.rows.b == i)
        return Strength(
            model=self.data.models[i],
            group=int(self.groups[i]),
            value=value,
            low=ends[0],
            high=ends[1],
            comparisons=float(self.rows.count[touched].sum()),
            clusters=clusters,
            bounded=len(set(self.classes[mates].tolist())) == 1,
        )


def _larger(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest simple covariance that is at least both: one + the positive part of the rest."""
    sizes, vectors = np.linalg.eigh(other - one)
    return one + vectors * sizes.clip(min=0) @ vectors.T
