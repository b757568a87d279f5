"""What two runs have in common: their rows, checkpoints and files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_samples import same, weights

from openpalm.checkpoint import directory as checkpoint
from openpalm.train.logging.metrics import read_rows

Train = Callable[..., int]


TIMES = {"elapsed_s", "tokens_per_s", "mfu"}


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run computed, without what a clock said."""
    if not (run / name).exists():
        return []
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_rows(run / name)
    ]


def step_names(run: Path) -> list[str]:
    return [directory.name for directory in checkpoint.steps(run)]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return weights(checkpoint.load(checkpoint.steps(run)[-1]))


def same_run(a: Path, b: Path) -> bool:
    """Equal losses, samples and weights, bit for bit."""
    names = ("metrics.jsonl", "samples.jsonl")
    return all(rows(a, name) == rows(b, name) for name in names) and same(
        final_weights(a), final_weights(b)
    )


class Killed(BaseException):
    """Ends a run in the middle of a step without any of its care, as SIGKILL would."""


def kill() -> None:
    raise Killed


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)
