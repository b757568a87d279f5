"""What the tables of train.py have in common: batches, the clock, progress and Markdown."""

import sys
import time
from dataclasses import replace
from typing import Any

import torch
from peers_train import Contender

from openpalm.data.batches.loader import Batch
from openpalm.model.config import ModelConfig, preset

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def sized(name: str, length: int) -> ModelConfig:
    return replace(preset(name).config, context=length)


def random_batch(vocab_size: int, rows: int, length: int) -> Batch:
    whole = torch.randint(0, vocab_size, (rows, length + 1))
    return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous())


def step_seconds(
    who: Contender, batch: Batch, steps: int, device: torch.device, *, unmeasured: int = 0
) -> float:
    """Mean seconds of so many steps in a row, after some that are not measured."""
    for _ in range(unmeasured):
        who.step(batch)
    start = time.perf_counter()
    for _ in range(steps):
        who.step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def peaks_line(rows: list[Row]) -> str:
    peaks = {row["dtype"]: row["peak_flops"] / 1e9 for row in rows}
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in sorted(peaks.items()))
    return f"Matrix multiplication at best: {rates}\n\n"


def table(head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in cells)
