"""Batches that grow: what a step takes, what the rows say, and that a killed run goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_samples import random_loader, same, trainer_of, weights

from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import SettingsError
from openpalm.train.batch_shape import BatchShape, Ramp
from openpalm.train.config import TrainSettings
from openpalm.train.logging.metrics import read_rows
from openpalm.train.microbatches import batch_shape
from openpalm.train.sizing import measure
from openpalm.train.trainer import Trainer


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"data": Path("d"), "out": Path("o"), "model": "palm-tiny", "steps": 5}
    return TrainSettings(**plain | changes)


RAMP = Ramp.parse("1/4@0.1,1/2@0.3")


def test_a_stage_ends_where_it_says():
    """PaLM: a quarter for 50,000 of 255,000 steps, a half until 115,000 (section 5)."""
    assert [RAMP.share(step, 20) * 4 for step in range(1, 9)] == [1, 1, 2, 2, 2, 2, 4, 4]
    palm = Ramp.parse(f"1/4@{50 / 255:.9f},1/2@{115 / 255:.9f}")
    sequences = [2048 * palm.share(step, 255_000) for step in (1, 50_000, 50_001, 115_000, 115_001)]
    assert sequences == [512, 512, 1024, 1024, 2048]


@pytest.mark.parametrize("text", [None, "1/4@0.1,1/2@0.3", "2/3@0.5"])
def test_the_mean_is_over_all_steps(text: str | None):
    ramp = Ramp.parse(text)
    shares = [ramp.share(step, 1000) for step in range(1, 1001)]
    assert ramp.mean == pytest.approx(float(sum(shares)) / 1000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/2",
        "1/2@1",
        "0@0.1",
        "1/0@0.1",
        "3/2@0.1",
        "1/2@0.3,1/4@0.5",
        "1/4@0.5,1/2@0.5",
        "x@y",
    ],
)
def test_a_wrong_ramp_is_one_line(text: str):
    with pytest.raises(SettingsError) as caught:
        settings(batch_ramp=text)
    assert str(caught.value).startswith(f"--batch-ramp {text}: must be SHARE@UNTIL, both rising")


def test_microbatches_are_cut_so_that_every_stage_is_whole():
    asked = settings(batch_tokens=16 * 64, batch_ramp="1/4@0.1,1/2@0.3")
    assert batch_shape(asked, 64) == BatchShape(64, rows=4, accumulation=4, ramp=RAMP)
    tight = replace(asked, microbatch_tokens=2 * 64)
    assert batch_shape(tight, 64) == BatchShape(64, rows=2, accumulation=8, ramp=RAMP)
    with pytest.raises(SettingsError) as caught:
        batch_shape(replace(asked, batch_tokens=6 * 64), 64)
    assert str(caught.value) == (
        "--batch-ramp 1/4@0.1,1/2@0.3: does not cut 6 sequences a process whole; "
        "take --batch-tokens a multiple of 256"
    )


def test_a_step_takes_its_share_of_microbatches():
    loader = random_loader(rows=2)
    trainer = trainer_of(loader=loader, accumulation=4, ramp=RAMP, steps=10)
    counts = [trainer.train_step().count for _ in range(5)]
    row = 12
    assert counts == [2 * row, 4 * row, 4 * row, 8 * row, 8 * row]
    assert loader.state_dict()["rows_consumed"] == sum(counts) / row


def test_a_share_of_a_batch_is_a_batch_of_that_size():
    """Also in its gradient: the mean is over the tokens that are there."""
    ramped = trainer_of(loader=random_loader(rows=2), accumulation=4, ramp=RAMP, steps=10)
    small = trainer_of(loader=random_loader(rows=2), accumulation=1, steps=10)
    assert ramped.train_step() == small.train_step()
    assert same(weights(ramped.model), weights(small.model))


def test_a_killed_run_resumes_in_its_stage(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"batch_ramp": "1/4@0.25,1/2@0.75", "save_every": 3}
    assert train(tmp_path / "whole", **options) == 0
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    counted = [row["tokens"] for row in rows if "tokens" in row]
    assert counted == [32, 64, 128, 192, 256, 320, 448, 576]
    assert all(row["mfu"] for row in rows if "tokens" in row)  # every step was whole

    original = Trainer.forward_backward

    def killed(self: Trainer, batches: Any) -> Any:
        if self.step + 1 == 5:
            raise KeyboardInterrupt
        return original(self, batches)

    monkeypatch.setattr(Trainer, "forward_backward", killed)
    assert train(tmp_path / "cut", **options) != 0
    monkeypatch.setattr(Trainer, "forward_backward", original)
    assert train(tmp_path / "cut", **options) == 0
    again = read_rows(tmp_path / "cut" / "metrics.jsonl")
    losses = [[row["loss"] for row in r if "loss" in row] for r in (rows, again)]
    assert losses[0] == losses[1]
    last = [checkpoint.load(checkpoint.steps(tmp_path / name)[-1]) for name in ("whole", "cut")]
    assert same(weights(last[0]), weights(last[1]))


def test_epochs_count_what_is_taken(train: Callable[..., int], tmp_path: Path):
    assert train(tmp_path / "plain", steps=None, epochs=0.1) == 0
    assert train(tmp_path / "ramp", steps=None, epochs=0.1, batch_ramp="1/4@0.2,1/2@0.6") == 0
    tokens = {}
    for name in ("plain", "ramp"):
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        tokens[name] = max(row["tokens"] for row in rows if "tokens" in row)
    assert tokens["ramp"] == pytest.approx(tokens["plain"], rel=0.05)


def test_minutes_hold_more_steps_where_batches_are_small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "_step_seconds", lambda trainer: 0.1)
    monkeypatch.setattr(measure, "_probe_seconds", lambda *_: 0.0)
    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.0)
    steps = []
    for ramp in (None, "1/2@0.5"):
        asked = settings(steps=None, minutes=1.0, dtype="float32", batch_ramp=ramp)
        measured = measure.measure(
            asked, lambda _: trainer_of(), [], torch.device("cpu"), step_tokens=100
        )
        steps.append(measured.steps)
    assert steps[1] == pytest.approx(steps[0] / 0.75, rel=0.02)


def test_the_whole_batch_is_what_is_timed(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timed: list[Ramp] = []
    monkeypatch.setattr(measure, "_step_seconds", lambda trainer: timed.append(trainer.ramp) or 1e3)
    assert train(tmp_path / "run", steps=None, minutes=0.1, batch_ramp="1/2@0.5") == 0
    assert timed == [Ramp()]
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["batch_ramp"] == "1/2@0.5"
