"""Interrupted runs: killed, stopped by a signal, out of disk; a resumed run equals a whole one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import Killed, Train, kill, rows, same_run, send, step_names

from openpalm.checkpoint import contents
from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [2, 4, 5])  # 4 is saved anyway
def test_a_signal_saves_and_the_same_command_resumes(
    train: Train,
    reference: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    step: int,
):
    out = tmp_path / "run"
    at_step(step, send(number))
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as ended:
            train(out)
        assert ended.value.code == 128 + number
    else:
        assert train(out) == 128 + number
    assert checkpoint.steps(out)[-1].name == checkpoint.step_name(step)
    assert rows(out)[-1]["step"] == step
    assert (
        f"stopped after step {step}; run the same command again to continue"
        in capsys.readouterr().err
    )
    assert train(out) == 0
    assert f"resuming after step {step}" in capsys.readouterr().err
    assert same_run(out, reference)


def test_a_second_signal_ends_at_once(
    train: Train, reference: Path, tmp_path: Path, at_step: Callable[..., None]
):
    out = tmp_path / "run"
    at_step(6, lambda: [send(signal.SIGINT)(), send(signal.SIGINT)()])
    assert train(out) == 128 + signal.SIGINT
    assert step_names(out) == ["step-00000004"]
    assert train(out) == 0
    assert same_run(out, reference)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 8])
def test_killed_in_any_step_the_same_command_resumes(
    train: Train, reference: Path, tmp_path: Path, at_step: Callable[..., None], step: int
):
    out = tmp_path / "run"
    at_step(step, kill)
    with pytest.raises(Killed):
        train(out)
    restored = 4 if step > 4 else 0
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, step))
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 9, "lo')  # later, and torn
    leftover = out / "checkpoints" / ".step-00000008.partial-1"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert len(checkpoint.steps(out)) == restored // 4
    assert train(out) == 0
    assert same_run(out, reference)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_writing_of_the_settings(
    train: Train,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
):
    from openpalm.train import run_directory as run_module

    original = run_module.write_atomically

    def patched(path: Path, text: str) -> None:
        if when == "after":
            original(path, text)
        else:
            path.with_name(f".{path.name}.partial").write_text(text[:20], encoding="utf-8")
        raise Killed

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_atomically", patched)
        with pytest.raises(Killed):
            train(out)
    assert train(out) == 0
    assert same_run(out, reference)


def test_a_full_disk_while_saving_loses_nothing(
    train: Train,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    original = contents.write_manifest

    def full(partial: Path, lineage: dict[str, Any]) -> None:
        if lineage["step"] == 8:
            raise OSError(28, "No space left on device")
        original(partial, lineage)

    with monkeypatch.context() as patch:
        patch.setattr(contents, "write_manifest", full)
        assert train(out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("step-00000008: cannot be saved (No space left on device)")
    assert step_names(out) == ["step-00000004"]
    assert train(out) == 0
    assert same_run(out, reference)


def program(out: Path, data: Path) -> list[str]:
    words = "--model palm-tiny --steps 30 --sequence-length 32 --batch-tokens 128 --dtype float32"
    words += f" --save-every 10 --eval-every 30 --data {data} --out {out}"
    return [sys.executable, "-m", "openpalm", "train", *words.split()]


def test_the_program_stopped_from_outside_resumes(data: Path, tmp_path: Path):
    """Across processes: stopped and repeated there, uninterrupted here, equal bit for bit."""
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert main(program(whole, data)[3:]) == 0

    with subprocess.Popen(
        program(out, data), env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 1800
        while not (out / "metrics.jsonl").exists() and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        error = running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM, error
    stopped_at = rows(out)[-1]["step"]
    assert f"stopped after step {stopped_at}; run the same command again to continue" in error
    assert stopped_at < 30

    done = subprocess.run(program(out, data), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'checkpoints' / 'step-00000030'}\n"
    assert f"resuming after step {stopped_at}" in done.stderr
    assert same_run(out, whole)
    assert json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])


@pytest.mark.parametrize("name", ["stable-adamw", "lion", "adafactor", "muon"])
def test_killed_with_any_optimizer_the_same_command_resumes(
    train: Train, tmp_path: Path, at_step: Callable[..., None], name: str
):
    ask = {"optim.name": name}
    assert train(tmp_path / "whole", **ask) == 0
    at_step(6, kill)
    with pytest.raises(Killed):
        train(tmp_path / "cut", **ask)
    assert train(tmp_path / "cut", **ask) == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")
