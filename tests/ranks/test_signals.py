"""SIGTERM at random moments to one process, or to both: the run always saves and resumes."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rank_runs import LIMIT_S, call, in_step, rank
from train_runs import rows, same_run, step_names
from train_samples import write_dataset

from openpalm.checkpoint import directory as checkpoint
from ranks import on_ranks

SIGNALS = 6
APART = 12
"""most steps from one signal to the next"""


def options(signals: int) -> dict[str, Any]:
    steps = (signals + 2) * APART
    return {"steps": steps, "eval_every": steps, "save_every": 8}


def signalled(out: Path, data: Path, seed: int, asked: dict[str, Any]) -> tuple[int, float]:
    """The exit status of the run, and the seconds from the signal to its end."""
    drawn = random.Random(seed)
    step, after_s = _reached(out) + drawn.randint(1, APART), drawn.uniform(0, 0.02)
    to = drawn.choice(["process 0", "process 1", "both"])
    sent: list[float] = []

    def ask() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def fault(patch: pytest.MonkeyPatch) -> None:
        if to in ("both", f"process {rank()}"):
            timer = threading.Timer(after_s, ask)
            in_step(patch, step, timer.start)

    status, _ = call(out, data, fault, asked)
    return status, time.monotonic() - sent[0] if sent else 0.0


def _reached(out: Path) -> int:
    found = checkpoint.steps(out)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def terminate(folder: Path, signals: int) -> dict[str, Any]:
    """A run that gets so many signals, one after another, against one that gets none."""
    data, out = write_dataset(folder / "plain"), folder / "run"
    asked, slowest, ended = options(signals), 0.0, 0
    for number in range(signals):
        found = on_ranks(2, signalled, out, data, number, asked, limit_s=LIMIT_S)
        statuses = [status for status, _ in found]
        if statuses == [0, 0]:
            break
        assert statuses == [143, 143]
        step = rows(out)[-1]["step"]
        assert step_names(out)[-1] == checkpoint.step_name(step)
        slowest, ended = max(slowest, *(seconds for _, seconds in found)), ended + 1
    on_ranks(2, call, out, data, None, asked, limit_s=LIMIT_S)
    on_ranks(2, call, folder / "whole", data, None, asked, limit_s=LIMIT_S)
    return {"signals": ended, "slowest_s": slowest, "equal": same_run(out, folder / "whole")}


def test_signals_at_random_moments_lose_nothing(tmp_path: Path):
    found = terminate(tmp_path, SIGNALS)
    assert found["signals"] == SIGNALS
    assert found["equal"]
