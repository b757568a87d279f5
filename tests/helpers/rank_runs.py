"""`openpalm train` of a tiny model on several processes of a test, with faults put in.

`on_ranks(2, call, out, data, fault, {...})` runs it on each; `fault` is a function of the test's
module that is called with a MonkeyPatch before the run.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_samples import tiny

from openpalm.cli.main import main
from openpalm.model.config import PRESETS, Preset
from openpalm.parallel import lost
from openpalm.train.sizing import measure
from openpalm.train.trainer import Trainer

Fault = Callable[[pytest.MonkeyPatch], None]
LIMIT_S = 900.0
"""for a test's processes, on a machine that is busy"""


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def call(out: Path, data: Path, fault: Fault | None, changes: dict[str, Any]) -> tuple[int, str]:
    """The exit status of the run in this process, and what it printed to standard error."""
    options: dict[str, object] = {
        "model": "tiny",
        "data": data,
        "steps": 8,
        "sequence_length": 16,
        "batch_tokens": 128,
        "dtype": "float32",
        "save_every": 4,
        "eval_every": 8,
        "arch.dropout": 0.1,
    }
    options |= changes
    words = [f"--{name.replace('_', '-')}={v}" for name, v in options.items() if v is not None]
    return command(["train", f"--out={out}", *words], fault)


def command(words: list[str], fault: Fault | None = None) -> tuple[int, str]:
    """The exit status of any command in this process, and what it printed to standard error."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # `main` silences all but the first
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setitem(PRESETS, "tiny", Preset(tiny(vocab_size=265), 1e-2, "for tests"))
        patch.setattr(measure, "matmul_flops", lambda *_: 1e9)
        patch.setattr(lost, "_REPORTS_S", 2.0)
        patch.setattr("openpalm.cli.main._OTHERS_WAIT_S", 0.0)
        if fault is not None:
            fault(patch)
        try:
            return main(words), said.getvalue()
        except SystemExit as ended:
            return int(ended.code or 0), said.getvalue()


def in_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Calls something once, in the middle of the step of that number."""
    original = Trainer.forward_backward
    todo = [action]

    def patched(self: Trainer, batches: Any) -> Any:
        if self.step + 1 == step and self.steps < 10**6 and todo:
            todo.pop()()
        return original(self, batches)

    patch.setattr(Trainer, "forward_backward", patched)


def wait_for(condition: Callable[[], bool], limit_s: float = 300.0) -> None:
    """Returns once the condition holds. Raises AssertionError after the time limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
