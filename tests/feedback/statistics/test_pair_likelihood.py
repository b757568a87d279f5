"""Derivatives against finite differences, and clustered products against a sum over clusters."""

import numpy as np
import pytest

from openpalm.feedback.statistics.pair_likelihood import (
    Rows,
    clusters_of_models,
    gradient,
    information,
    score_products,
    terms,
)


def rows_of(seed, *, davidson, n=60, models=4, features=2):
    generator = np.random.default_rng(seed)
    a = generator.integers(0, models, n)
    return Rows(
        a=a,
        b=(a + generator.integers(1, models, n)) % models,
        score=generator.choice([0, 0.5, 1], n),
        count=generator.integers(1, 4, n).astype(float),
        style=generator.normal(size=(n, features)),
        models=models,
        davidson=davidson,
    )


def slope(function, at, step=1e-6):
    """Central differences of a function of a vector; the last axis is the parameter."""
    moves = np.eye(len(at)) * step
    return np.stack([(function(at + m) - function(at - m)) / (2 * step) for m in moves], axis=-1)


@pytest.mark.parametrize("davidson", [False, True])
def test_derivatives(davidson):
    rows = rows_of(0, davidson=davidson)
    at = np.random.default_rng(1).normal(size=rows.parameters)

    def value(parameters):
        return rows.count @ terms(rows, parameters).log_likelihood

    def first(parameters):
        return gradient(rows, terms(rows, parameters))

    assert first(at) == pytest.approx(slope(value, at), abs=1e-4)
    assert information(rows, terms(rows, at)) == pytest.approx(-slope(first, at), abs=1e-4)


@pytest.mark.parametrize("davidson", [False, True])
def test_products_of_clusters(davidson):
    """Each cluster's gradient by itself; rows without a cluster count one comparison each."""
    rows = rows_of(2, davidson=davidson)
    at = np.random.default_rng(3).normal(size=rows.parameters)
    clusters = np.random.default_rng(4).integers(-1, 6, len(rows.a))
    clusters[:7] = range(-1, 6)

    def scores(chosen, count):
        part = Rows(
            *(getattr(rows, name)[chosen] for name in ("a", "b", "score")),
            count=count,
            style=rows.style[chosen],
            models=rows.models,
            davidson=davidson,
        )
        return gradient(part, terms(part, at))

    sums = [scores(clusters == c, rows.count[clusters == c]) for c in range(6)]
    for n in np.flatnonzero(clusters < 0):
        sums += [scores([n], np.ones(1))] * int(rows.count[n])
    products, number = score_products(rows, terms(rows, at), clusters)
    assert number == len(sums)
    expected = sum(np.outer(one, one) for one in sums) * number / (number - 1)
    assert products == pytest.approx(expected)


def test_clusters_of_each_model():
    rows = Rows(
        a=np.array([0, 0, 1, 2]),
        b=np.array([1, 1, 0, 3]),
        score=np.ones(4),
        count=np.array([1.0, 1.0, 1.0, 5.0]),
        style=np.zeros((4, 0)),
        models=5,
    )
    assert clusters_of_models(rows, np.array([0, 0, 1, -1])).tolist() == [2, 2, 5, 5, 0]
