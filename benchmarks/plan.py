"""Step times that `openpalm plan --gpu cpu` predicts, and those of the trainer on this machine.

    python benchmarks/plan.py

Takes about a minute on a quiet machine; the fastest of some steps counts.
"""

import argparse
import os
import time
from dataclasses import replace

import torch
from peers_train import OpenPalm, Rules
from train_common import DTYPES, random_batch, say, sized, table

from openpalm.base.device import processor
from openpalm.data.batches.loader import Batch
from openpalm.plan.devices import Device, measured_cpu
from openpalm.plan.layouts import Layout
from openpalm.plan.time import step_time
from openpalm.plan.training import Training

CPU = torch.device("cpu")
POINTS = (
    ("palm-5m", 512, "adamw", "none"),
    ("palm-14m", 512, "muon", "none"),
    ("palm-14m", 2048, "lion", "full"),
    ("palm-32m", 1024, "adamw", "none"),
)
RATES = 12
"""Measurements of the machine's rates; the best counts."""
HEAD = ("model", "length", "optimizer", "recompute", "predicted s", "measured s", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured step times.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each point")
    how = parser.parse_args()
    say(f"{processor()}; {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    device = best_rates(how.dtype)
    rates = f"{device.peak[how.dtype] / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s"
    say(f"matrix multiplication in {how.dtype} and elementwise passes at best: {rates}")
    lines = [point(*given, device, how.dtype, how.steps) for given in POINTS]
    print(table(HEAD, lines))


def best_rates(dtype: str) -> Device:
    """The best of several measurements: other programs only make them worse."""
    found = [measured_cpu(dtype) for _ in range(RATES)]
    peak = max(device.peak[dtype] for device in found)
    return replace(found[0], peak={dtype: peak}, bandwidth=max(d.bandwidth for d in found))


def point(
    name: str,
    length: int,
    optimizer: str,
    recompute: str,
    device: Device,
    dtype: str,
    steps: int,
) -> tuple[str, ...]:
    """One line of the table."""
    config = sized(name, length)
    training = replace(
        Training(config, length, rows=1),
        optimizer=optimizer,
        recompute=recompute,
        dtype=dtype,
    )
    planned = step_time(training, Layout(), device)
    who = OpenPalm(
        Rules(config, getattr(torch, dtype), CPU),
        optim={"name": optimizer},
        memory={"recompute": recompute},
    )
    batch = random_batch(config.vocab_size, 1, length)
    who.step(batch)
    measured = min(_seconds(who, batch) for _ in range(steps))
    parts = ", ".join(f"{part} {s:.3f}" for part, s in planned.parts.items() if s)
    say(f"{name} {length}: predicted {parts}")
    return (
        name,
        str(length),
        optimizer,
        recompute,
        f"{planned.total:.3f}",
        f"{measured:.3f}",
        f"{planned.total / measured:.2f}",
    )


def _seconds(who: OpenPalm, batch: Batch) -> float:
    """Seconds of a step. One thread is timed by its own clock, which other programs do not stop."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    who.step(batch)
    return clock() - start


if __name__ == "__main__":
    main()
