"""Choices made by measuring: once, from the timings, and without a trace in the run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_samples import random_loader, tiny, trainer_of

from openpalm.model.transformer import initialise
from openpalm.parallel.world import World
from openpalm.train.config import TrainSettings
from openpalm.train.probes import Probe
from openpalm.train.run import run_training
from openpalm.train.sizing import measure
from openpalm.train.sizing.measure import Measured, fit
from openpalm.train.spec import TrainSpec

CPU = torch.device("cpu")


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"data": Path("d"), "out": Path("o"), "model": "tiny", "steps": 5}
    return TrainSettings(**plain | changes)


def refuse(*_: object) -> Any:
    raise AssertionError("measured what was known")


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Seconds of a step by dtype, instead of a stopwatch."""
    seconds = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(measure, "_step_seconds", lambda trainer: seconds[trainer.dtype])
    monkeypatch.setattr(measure, "_probe_seconds", lambda *_: 2.0)
    monkeypatch.setattr(measure, "matmul_flops", lambda device, dtype: 1e12)
    return seconds


def measured(asked: TrainSettings, **known: bool) -> Measured:
    return measure.measure(asked, scratch, [], CPU, step_tokens=100, **known)


def scratch(dtype: torch.dtype) -> Any:
    return SimpleNamespace(dtype=dtype, world=World())


@pytest.mark.parametrize(
    ("bfloat16_s", "expected"),
    [(0.5, "bfloat16"), (0.9, "bfloat16"), (0.97, "float32"), (1.0, "float32"), (3.0, "float32")],
)
def test_bfloat16_must_be_clearly_faster(
    timings: dict[torch.dtype, float], bfloat16_s: float, expected: str
):
    timings[torch.bfloat16] = bfloat16_s
    assert measured(settings()) == Measured(dtype=expected, peak_flops=1e12)  # type: ignore[arg-type]


def test_what_is_known_is_not_measured_again(
    timings: dict[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
):
    """A dtype that was asked for, and steps of a run that is repeated."""
    monkeypatch.setattr(measure, "_step_seconds", refuse)
    for dtype in ("float32", "bfloat16"):
        assert measured(settings(dtype=dtype)) == Measured(dtype, 1e12)  # type: ignore[arg-type]
        asked = settings(steps=None, minutes=1.0, dtype=dtype)
        assert measured(asked, steps_known=True) == Measured(dtype, 1e12)  # type: ignore[arg-type]


def test_steps_that_fit_the_minutes(timings: dict[torch.dtype, float]):
    timings[torch.bfloat16] = 0.5
    found = measured(settings(steps=None, minutes=10.0))
    assert found.dtype == "bfloat16"
    assert found.steps is not None
    assert found.eval_every is not None
    looks = -(-found.steps // found.eval_every)
    used = found.steps * 0.5 + looks * 2.0  # of 600 seconds
    assert 595 < used <= 600
    assert measured(settings(steps=None, minutes=10.0, eval_every=50)).eval_every == 50


@pytest.mark.parametrize("left_s", [-5.0, 0.0, 0.3, 7.0, 60.0, 3600.0])
@pytest.mark.parametrize("step_s", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("look_s", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("eval_every", [None, 1, 25])
def test_a_time_budget_holds_its_steps_and_evaluations(
    left_s: float, step_s: float, look_s: float, eval_every: int | None
):
    steps, every = fit(left_s, step_s, look_s, eval_every)
    assert steps >= 1
    assert every >= 1
    assert every == (eval_every or every)
    if steps > 1:
        looks = -(-steps // every)
        assert steps * step_s + (looks - 1) * look_s <= left_s + 1e-6


def test_the_rate_of_this_machine_is_a_rate():
    assert 1e8 < measure.matmul_flops(CPU, torch.float32, repeats=1) < 1e16


def test_emulated_bfloat16_is_not_even_tried(
    timings: dict[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: False)
    timings[torch.bfloat16] = 0.1
    assert measured(settings()).dtype == "float32"
    monkeypatch.setattr(measure, "_step_seconds", refuse)
    assert measured(settings()).dtype == "float32"


def test_float16_is_for_gpus_without_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: False)
    gpu = torch.device("cuda")
    assert measure._half(gpu, settings()) == "float16"
    assert measure._half(CPU, settings()) is None
    monkeypatch.setattr(TrainSettings, "takes_float16", False)  # as rollouts
    assert measure._half(gpu, settings()) is None
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: True)
    assert measure._half(gpu, settings()) == "bfloat16"


class Clock:
    """A clock that only what is measured moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: dict[torch.dtype, float]):
        self.now, self.steps = 0.0, list[torch.dtype]()
        self.step_s = step_s
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: True)
        monkeypatch.setattr(measure, "matmul_flops", lambda device, dtype: 1e12)
        monkeypatch.setattr(measure, "_step_seconds", self.step)

    def step(self, trainer: Any) -> float:
        self.steps.append(trainer.dtype)
        self.now += self.step_s[trainer.dtype]
        return self.step_s[trainer.dtype]


def test_a_hopeless_dtype_is_given_up_after_one_step(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch, {torch.float32: 0.5, torch.bfloat16: 5.0})
    assert measured(settings()).dtype == "float32"
    assert clock.steps.count(torch.bfloat16) == 1
    assert clock.steps.count(torch.float32) == 1 + 6  # 3 seconds of them


@pytest.mark.parametrize(("minutes", "limit_s"), [(None, 20.0), (1.0, 3.0), (60.0, 20.0)])
def test_timing_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch, minutes: Any, limit_s: float):
    """Never more than one step of each dtype past the limit."""
    for step_s in (0.1, 1.0, 7.0, 30.0):
        clock = Clock(monkeypatch, {torch.float32: step_s, torch.bfloat16: step_s})
        measured(settings(minutes=minutes, steps=None if minutes else 5))
        assert clock.now <= max(limit_s, 2 * step_s)


def test_a_long_evaluation_is_predicted_from_a_step(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch, {torch.float32: 1.0})

    def read(model: Any, dtype: Any) -> dict[str, Any]:
        clock.now += 100.0
        return {}

    class Scratch:
        model, dtype, world = torch.nn.Identity(), torch.float32, World()

    found = measure._probe_seconds(Scratch(), [Probe(read, tokens=1000)], 0.1, until=20.0)  # type: ignore[arg-type]
    assert found == pytest.approx(1000 * 0.1 * measure._FORWARD_SHARE)
    assert clock.now == 0
    assert measure._probe_seconds(Scratch(), [Probe(read, tokens=10)], 0.1, until=20.0) == 100.0  # type: ignore[arg-type]


def test_a_step_is_predicted_from_one_microbatch():
    trainer = trainer_of(accumulation=4)
    began = trainer.step
    assert measure._step_seconds(trainer) > 0
    assert trainer.step == began


def test_a_probe_with_steps_of_its_own_makes_every_step_longer(timings: dict[torch.dtype, float]):
    asked = settings(steps=None, minutes=1.0, dtype="float32", eval_every=10)
    probes = [Probe(lambda model, dtype: {}, every=4)]
    found = [measure.measure(asked, scratch, given, CPU, step_tokens=100) for given in ([], probes)]
    # A step takes 1 s, the evaluations 2 s every 10 steps, the probe 2 s every 4 steps. Measuring
    # itself takes a moment of the minute.
    assert [each.steps for each in found] == [49, 35]


def test_every_probe_is_timed_once(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[object, object]] = []
    trainer = trainer_of()
    probes = [Probe(lambda model, dtype: seen.append((model, dtype)) or {}) for _ in range(3)]
    asked = settings(steps=None, minutes=0.01, dtype="float32")
    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1.0)
    found = measure.measure(asked, lambda dtype: trainer, probes, CPU, step_tokens=100)
    assert seen == [(trainer.model, torch.float32)] * 3
    assert found.steps is not None
    assert 1 <= found.steps < 600  # a step takes more than a millisecond


def losses(out: Path, asked: TrainSettings) -> list[float]:
    config = tiny(dropout=0.2)
    spec = TrainSpec(
        config=config,
        fill=lambda model: initialise(model, 0),
        make_loader=lambda shape, *_: random_loader(shape.rows),
        sequences_per_epoch=10,
        learning_rate=1e-2,
        probes=[Probe(lambda model, dtype: {"seen": 1})],
    )
    run_training(replace(asked, out=out), spec)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_measuring_leaves_no_trace_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Dropout draws from the global random state, which measuring uses too."""
    asked = settings(steps=6, sequence_length=12, batch_tokens=48)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_step_seconds", refuse)
        patch.setattr(measure, "matmul_flops", lambda *_: 1e9)
        quiet = losses(tmp_path / "known", replace(asked, dtype="float32"))
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda device: True)
    timed: list[torch.dtype] = []
    stopwatch = measure._step_seconds

    def noted(trainer: Any, *more: Any) -> float:
        timed.append(trainer.dtype)
        stopwatch(trainer, *more)
        return {torch.float32: 1.0, torch.bfloat16: 2.0}[trainer.dtype]

    monkeypatch.setattr(measure, "_step_seconds", noted)
    torch.manual_seed(1234)
    assert losses(tmp_path / "measured", asked) == quiet
    assert set(timed) == {torch.float32, torch.bfloat16}
    assert len(quiet) == 6
