"""What a run keeps in memory is free to choose, at any time, and changes no loss."""

from collections.abc import Callable
from pathlib import Path

import pytest
from train_samples import random_loader, tiny

from openpalm.errors import SettingsError
from openpalm.train.config import TrainSettings
from openpalm.train.logging.metrics import read_rows
from openpalm.train.objective import NextToken
from openpalm.train.run import run_training
from openpalm.train.spec import TrainSpec


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


@pytest.fixture
def plain(reference: Path) -> list[float]:
    return losses(reference)


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_recomputing_changes_no_loss(
    train: Callable[..., int], tmp_path: Path, plain: list[float], recompute: str
):
    assert train(tmp_path / "run", **{"memory.recompute": recompute}) == 0
    assert losses(tmp_path / "run") == plain


def test_chunks_of_the_loss(train: Callable[..., int], tmp_path: Path, plain: list[float]):
    assert train(tmp_path / "run", **{"memory.loss_chunk": 7}) == 0
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=1e-5)


def test_a_run_that_needs_too_much_warns_and_runs(
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("openpalm.base.device.physical_memory", lambda: 1e5)
    assert train(tmp_path / "run") == 0
    assert "train: warning: needs about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recompute", "keep", "kept"),
    [("none", None, 1), ("full", None, 0), ("full", True, 1), ("none", False, 0)],
)
def test_freed_memory_is_kept_where_time_counts_for_more(
    train: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recompute: str,
    keep: bool | None,
    kept: int,
):
    calls: list[int] = []
    monkeypatch.setattr("openpalm.train.run.keep_freed_memory", lambda: calls.append(1))
    how = {} if keep is None else {"memory.keep_freed": keep}
    assert train(tmp_path / "run", **how, **{"memory.recompute": recompute}) == 0
    assert len(calls) == kept


def test_a_run_resumes_with_less_memory(
    train: Callable[..., int], tmp_path: Path, plain: list[float]
):
    run = tmp_path / "run"
    assert train(run) == 0
    for newest in (run / "checkpoints").glob("step-00000008"):
        (newest / "manifest.json").unlink()  # as if killed inside the last save
    assert train(run, **{"memory.recompute": "full"}) == 0
    assert losses(run) == plain


def test_z_loss_is_logged_and_changes_the_run(
    train: Callable[..., int], tmp_path: Path, plain: list[float]
):
    assert train(tmp_path / "run", z_loss=0.01) == 0
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(row["z_loss"] > 0 for row in rows)
    assert rows[-1]["z_loss"] < rows[0]["z_loss"]
    assert rows[0]["loss"] == pytest.approx(plain[0])  # reported without it
    assert rows[-1]["loss"] != plain[-1]


@pytest.mark.parametrize(
    ("name", "value"), [("memory.loss_chunk", 0), ("z_loss", -1), ("memory.recompute", "some")]
)
def test_values_that_make_no_sense(
    train: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: object,
):
    assert train(tmp_path / "run", **{name: value}) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert name.replace("_", "-") in said


def test_what_only_next_tokens_have_is_refused_elsewhere(tmp_path: Path):
    spec = TrainSpec(
        config=tiny(),
        fill=lambda model: None,
        make_loader=lambda *_: random_loader(),
        sequences_per_epoch=1,
        learning_rate=1e-3,
        objective=NextToken(),
    )
    settings = TrainSettings(tmp_path, tmp_path / "run", model="palm-tiny", steps=1, z_loss=1e-4)
    with pytest.raises(SettingsError, match=r"--z-loss 0\.0001: is of `train` and `sft`"):
        run_training(settings, spec)
    assert not (tmp_path / "run").exists()
