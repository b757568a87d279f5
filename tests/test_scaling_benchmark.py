"""benchmarks/scaling.py finds optima that are known, and the rules of --depth are its fit."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import scaling as bench

from openpalm.train.sizing import scaling as rules

COMMITTED = Path(bench.__file__).with_suffix(".csv")
BEST = 0.013


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[bench.Run]:
    """Stands in for training: a loss whose lowest point is known. The runs it was asked for."""
    asked: list[bench.Run] = []

    def loss(run: bench.Run, data: object) -> float:
        asked.append(run)
        return 3 + 0.1 * math.log2(run.lr / BEST) ** 2

    monkeypatch.setattr(bench, "trained", loss)
    return asked


def test_a_sweep_goes_on_until_its_best_is_inside(trained: list[bench.Run], tmp_path: Path):
    runs = bench.Runs(tmp_path / "runs.csv", object())  # pyright: ignore[reportArgumentType]
    best = runs.sweep(bench.Run(1, "adamw", lr=1e-3), "lr")
    assert best.lr == pytest.approx(0.016)
    assert {0.008, 0.032} <= {round(run.lr, 6) for run in trained}
    assert bench.Optimum.of({r.lr: x for r, x in runs.losses.items()}).rate == pytest.approx(
        BEST, rel=1e-3
    )


def test_a_stopped_sweep_goes_on(trained: list[bench.Run], tmp_path: Path):
    start = bench.Run(1, "adamw", lr=0.016)
    before = bench.Runs(tmp_path / "runs.csv", object())  # pyright: ignore[reportArgumentType]
    before.sweep(start, "lr")
    trained.clear()
    after = bench.Runs(tmp_path / "runs.csv", None)
    assert after.sweep(start, "lr") == start
    assert trained == []
    assert after.losses == before.losses


def check_power(power, law: dict[int, float]) -> None:
    exponent, factor = power({v: bench.Optimum(rate, 0.0) for v, rate in law.items()})
    assert all(factor * v**exponent == pytest.approx(rate) for v, rate in law.items())


def test_a_power_law_is_found():
    law = {size: 0.7 * size**-0.4 for size in (1, 2, 3, 8)}
    check_power(bench.power, law)
    with pytest.raises(AssertionError):  # logarithms of two bases
        check_power(lambda optima: (bench.power(optima)[0] * math.log(2), 0.7), law)


def check_rules(losses: dict[bench.Run, float]) -> None:
    """Every constant of the rules is what these runs say, to its last digit."""

    def law(sweep: str) -> tuple[float, float]:
        return bench.power(bench.optima(losses, sweep))

    def rate(sweep: str, value: float) -> float:
        exponent, factor = law(sweep)
        return factor * value**exponent

    batch = bench.best_batch(losses)
    assert batch == pytest.approx(rules.BEST_BATCH, rel=0.01)
    assert law("muon_lr against batch")[0] == pytest.approx(rules.RATE_BATCH_POWER, abs=0.006)
    assert law("muon_lr against tokens")[0] == pytest.approx(rules.RATE_TOKENS_POWER, abs=0.006)
    assert law("muon_lr against depth")[0] == pytest.approx(rules.MUON_DIM_POWER, abs=0.006)
    assert law("lr beside muon against depth")[0] == pytest.approx(rules.DIM_POWER, abs=0.006)
    assert rate("muon_lr against depth", 2) == pytest.approx(rules.MUON_RATE, rel=0.02)
    assert rate("lr beside muon against depth", 2) == pytest.approx(rules.REST_RATE, rel=0.02)
    adamw = bench.optima(losses, "lr of adamw against depth")[2]
    assert adamw.rate == pytest.approx(rules.ADAMW_RATE, rel=0.02)


def test_the_rules_are_the_fit_of_the_committed_runs():
    losses = bench.Runs(COMMITTED, None).losses
    check_rules(losses)
    deepest = max(run.depth for run in losses)
    other = {
        r: x + math.log2(r.muon_lr / 0.02) * 0.02 * (r.depth == deepest) for r, x in losses.items()
    }
    with pytest.raises(AssertionError):
        check_rules(other)


def test_the_runs_have_the_shape_of_the_rules():
    for depth in (1, 2, 3, 4):
        wanted = replace(rules.of_depth(depth).config, vocab_size=1024, context=bench.LENGTH)
        assert bench.of_depth(depth, 1024) == wanted


def test_a_run_trains(tmp_path: Path):
    from train_samples import write_dataset

    from openpalm.data.dataset.shards import open_dataset

    data = open_dataset(write_dataset(tmp_path / "data"))
    run = bench.Run(1, "muon", lr=1e-2, batch_tokens=512, tokens=1024)
    first, again = bench.trained(run, data), bench.trained(run, data)
    assert first == again
    assert np.isfinite(first)
