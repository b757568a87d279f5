"""Maximum likelihood of paired comparisons with covariates, and its robust covariance.

Two likelihoods of a comparison with the score difference d = strength_a - strength_b + style:

half       P(a) = sigmoid(d); a tie is half a win of each side (Bradley and Terry 1952)
davidson   P(a), P(b), P(tie) proportional to exp(d / 2), exp(-d / 2), exp(tie) (Davidson 1970)

Both are concave in (strengths, style coefficients, tie), so Newton's method finds the maximum.
Parameters: m strengths, then f style coefficients, then the tie parameter if there is one. No
(rows, parameters) matrix is built: a row touches two strengths only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

ITERATIONS = 60
DIVERGED = 20.0
"""a parameter of this size, odds of e^20, means that the data separate perfectly"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Comparisons as arrays of n rows."""

    a: np.ndarray
    """model indices (n,)"""
    b: np.ndarray
    score: np.ndarray
    """1: a won; 0: b won; 0.5: tie (n,)"""
    count: np.ndarray
    """comparisons that the row stands for (n,)"""
    style: np.ndarray
    """style differences a - b (n, f)"""
    models: int
    davidson: bool = False

    @property
    def parameters(self) -> int:
        return self.models + self.style.shape[1] + self.davidson

    def with_ties(self, pairs: Sequence[tuple[int, int]]) -> "Rows":
        """These rows and one tie of equal style for each pair of models."""
        a, b = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
        extra = np.zeros((len(a), self.style.shape[1]))
        return replace(
            self,
            a=np.concatenate([self.a, a]),
            b=np.concatenate([self.b, b]),
            score=np.concatenate([self.score, np.full(len(a), 0.5)]),
            count=np.concatenate([self.count, np.ones(len(a))]),
            style=np.concatenate([self.style, extra]),
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """Log-likelihood of each row and its derivatives in d and the tie parameter, all (n,)."""

    log_likelihood: np.ndarray
    d: np.ndarray
    tie: np.ndarray
    dd: np.ndarray
    """information: minus the second derivative"""
    d_tie: np.ndarray
    tie_tie: np.ndarray

    def first(self, rows: int) -> "Terms":
        return Terms(*(getattr(self, one.name)[:rows] for one in fields(self)))


def terms(rows: Rows, parameters: np.ndarray) -> Terms:
    """The rows' terms for one comparison each; counts are applied where rows are summed."""
    end = rows.models + rows.style.shape[1]
    strengths = parameters[: rows.models]
    d = strengths[rows.a] - strengths[rows.b] + rows.style @ parameters[rows.models : end]
    zero = np.zeros_like(d)
    if not rows.davidson:
        wins = 1 / (1 + np.exp(-np.clip(d, -700, 700)))
        # log sigmoid(d) = -log(1 + exp(-d)), without overflow.
        value = -rows.score * np.logaddexp(0, -d) - (1 - rows.score) * np.logaddexp(0, d)
        return Terms(value, rows.score - wins, zero, wins * (1 - wins), zero, zero)
    logits = np.stack([d / 2, -d / 2, np.full_like(d, parameters[end])])
    norm = np.logaddexp.reduce(logits)
    p_a, p_b, p_tie = np.exp(logits - norm)
    tied = rows.score == 0.5
    lead = (p_a - p_b) / 2
    return Terms(
        log_likelihood=(rows.score - 0.5) * d + tied * parameters[end] - norm,
        d=rows.score - 0.5 - lead,
        tie=tied - p_tie,
        dd=(p_a + p_b) / 4 - lead**2,
        d_tie=-lead * p_tie,
        tie_tie=p_tie * (1 - p_tie),
    )


def _sum_d(rows: Rows, values: np.ndarray) -> np.ndarray:
    """Sum over rows of values (n,) times the derivative of d: strengths, then style, (m + f,)."""
    strengths = np.bincount(rows.a, values, rows.models) - np.bincount(rows.b, values, rows.models)
    return np.concatenate([strengths, values @ rows.style])


def gradient(rows: Rows, found: Terms) -> np.ndarray:
    """Derivative of the log-likelihood, (p,)."""
    tie = [(rows.count * found.tie).sum()] if rows.davidson else []
    return np.concatenate([_sum_d(rows, rows.count * found.d), tie])


def outer_sum(rows: Rows, dd: np.ndarray, d_tie: np.ndarray, tie_tie: np.ndarray) -> np.ndarray:
    """Sum over rows of w x x^T, (p, p), x the derivatives of d and of the tie parameter.

    dd, d_tie and tie_tie (n,) are the weights of the three kinds of product.
    """
    m, f = rows.models, rows.style.shape[1]
    total = np.zeros((rows.parameters, rows.parameters))
    pair = np.bincount(rows.a * m + rows.b, dd, m * m).reshape(m, m)
    both = pair + pair.T
    total[:m, :m] = np.diag(both.sum(axis=1)) - both
    for k in range(f):
        column = _sum_d(rows, dd * rows.style[:, k])
        total[: m + f, m + k] = column
        total[m + k, : m + f] = column
    if rows.davidson:
        column = _sum_d(rows, d_tie)
        total[-1, :-1] = total[:-1, -1] = column
        total[-1, -1] = tie_tie.sum()
    return total


def information(rows: Rows, found: Terms) -> np.ndarray:
    """Minus the second derivative of the log-likelihood, (p, p)."""
    n = rows.count
    return outer_sum(rows, n * found.dd, n * found.d_tie, n * found.tie_tie)


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Pseudoinverse of a symmetric matrix, 0 in directions without information."""
    return np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)


@dataclass(frozen=True, slots=True)
class Fit:
    parameters: np.ndarray
    terms: Terms
    information: np.ndarray
    """with the prior's part"""
    converged: bool


def maximize(rows: Rows, style_precision: float = 0.0) -> Fit:
    """Newton's method with step halving; directions without information keep their start, 0.

    style_precision: precision of a normal prior around 0 on each style coefficient.
    """
    prior = np.zeros(rows.parameters)
    prior[rows.models : rows.models + rows.style.shape[1]] = style_precision
    at = np.zeros(rows.parameters)
    found = terms(rows, at)
    value = _objective(rows, found, prior, at)
    converged = False
    for _ in range(ITERATIONS):
        slope = gradient(rows, found) - prior * at
        step = inverse(information(rows, found) + np.diag(prior)) @ slope
        converged = bool(np.abs(step).max(initial=0) < 1e-9)
        if converged or np.abs(at).max(initial=0) > DIVERGED:
            break
        tried = terms(rows, at + step)
        while (new := _objective(rows, tried, prior, at + step)) < value - 1e-12 * abs(value):
            step = step / 2
            tried = terms(rows, at + step)
        at, found, value = at + step, tried, new
    return Fit(at, found, information(rows, found) + np.diag(prior), converged)


def _objective(rows: Rows, found: Terms, prior: np.ndarray, at: np.ndarray) -> float:
    return float(rows.count @ found.log_likelihood - prior @ at**2 / 2)


def score_products(rows: Rows, found: Terms, clusters: np.ndarray) -> tuple[np.ndarray, int]:
    """Sum over clusters of the products of their score sums, (p, p), and the clusters' number.

    clusters (n,): a number for each row; -1 marks a row of independent comparisons, each of
    which is a cluster. The factor G / (G - 1) corrects for few clusters.
    """
    own = clusters < 0
    n = rows.count * own
    total = outer_sum(rows, n * found.d**2, n * found.d * found.tie, n * found.tie**2)
    size = int(clusters.max(initial=-1)) + 1
    sums = np.zeros((size, rows.parameters))
    to, kept = clusters[~own], ~own
    scores = (rows.count * found.d)[kept]
    np.add.at(sums, (to, rows.a[kept]), scores)
    np.add.at(sums, (to, rows.b[kept]), -scores)
    for k in range(rows.style.shape[1]):
        sums[:, rows.models + k] = np.bincount(to, scores * rows.style[kept, k], size)
    if rows.davidson:
        sums[:, -1] = np.bincount(to, (rows.count * found.tie)[kept], size)
    number = size + round(float(n.sum()))
    return (total + sums.T @ sums) * number / max(1, number - 1), number


def clusters_of_models(rows: Rows, clusters: np.ndarray) -> np.ndarray:
    """How many clusters, numbered as in `score_products`, compare each model, (m,)."""
    own, m = clusters < 0, rows.models
    sides = np.concatenate([rows.a, rows.b])
    twice = np.concatenate([clusters, clusters])
    pairs = np.unique(twice[twice >= 0] * m + sides[twice >= 0])
    alone = np.bincount(rows.a, rows.count * own, m) + np.bincount(rows.b, rows.count * own, m)
    return np.bincount(pairs % m, minlength=m) + np.rint(alone).astype(int)
