"""Our statistics against the packages krippendorff, irrCAC and choix; needs them installed.

irrCAC pins an old scipy: install it with `pip install --no-deps irrCAC`, beside pandas and scipy.
"""

import math
import warnings

import numpy as np
import pytest
from agreement_table import table_of

from openpalm.feedback.statistics.board import Comparison
from openpalm.feedback.statistics.bradley_terry import fit

SCALES = ("nominal", "ordinal", "interval")


def ratings(seed, *, items=40, raters=5, categories=4, missing=0.3):
    """(items, raters) of 1 to `categories`, nan where missing, with some agreement."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(1, categories + 1, (items, 1))
    noise = generator.integers(-1, 2, (items, raters))
    values = (truth + noise).clip(1, categories).astype(float)
    values[generator.random((items, raters)) < missing] = np.nan
    return values


def counted(values, categories):
    return table_of(
        categories,
        [
            (item, rater, int(value))
            for item, row in enumerate(values)
            for rater, value in enumerate(row)
            if not math.isnan(value)
        ],
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(10))
def test_alpha_equals_krippendorff(scale, seed):
    package = pytest.importorskip("krippendorff")
    values = ratings(seed, raters=2 + seed % 5, categories=2 + seed % 4, missing=seed / 15)
    categories = range(1, 3 + seed % 4)
    expected = package.alpha(
        reliability_data=values.T, level_of_measurement=scale, value_domain=list(categories)
    )
    found = counted(values, categories).figures(scale, resamples=10).alpha
    assert found.value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(6))
def test_ac_equals_irrcac(scale, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its old numpy and pandas calls
        raw = pytest.importorskip("irrCAC.raw")
        pandas = pytest.importorskip("pandas")
        values = ratings(seed, raters=2 + seed, missing=0.1 + seed / 20)
        # irrCAC drops no item without a rating itself.
        values = values[~np.isnan(values).all(axis=1)]
        weights = {"nominal": "identity", "ordinal": "ordinal", "interval": "quadratic"}[scale]
        package = raw.CAC(pandas.DataFrame(values), weights=weights, categories=[1, 2, 3, 4])
        expected = package.gwet()["est"]
    found = counted(values, range(1, 5)).figures(scale, resamples=10)
    assert found.gwet[:2] == pytest.approx(
        (expected["coefficient_value"], expected["se"]), abs=1e-5
    )
    assert found.gwet[2:] == pytest.approx(expected["confidence_interval"], abs=1e-4)
    if scale == "nominal":
        assert found.raw.value == pytest.approx(expected["pa"], abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_strengths_equal_choix(seed):
    choix = pytest.importorskip("choix")
    generator = np.random.default_rng(seed)
    models = 3 + seed
    true = generator.normal(size=models)
    pairs = [generator.choice(models, 2, replace=False) for _ in range(400)]
    wins = [
        (int(i), int(j)) if generator.random() < 1 / (1 + math.exp(true[j] - true[i])) else (j, i)
        for i, j in pairs
    ]
    board = fit([Comparison(f"m{i}", f"m{j}", "a") for i, j in wins])
    assert board.notes == ()
    expected = choix.opt_pairwise(models, wins, tol=1e-12)
    found = [board[f"m{i}"].value for i in range(models)]
    assert found == pytest.approx(expected - expected.mean(), abs=1e-5)
    slower = choix.mm_pairwise(models, wins, tol=1e-10)
    assert found == pytest.approx(slower - slower.mean(), abs=1e-5)
