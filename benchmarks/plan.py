"""Step times that `openpalm plan --gpu cpu` predicts, beside those of the trainer on this machine.

    python benchmarks/plan.py

Takes about a minute on a quiet machine; the fastest of some steps counts.
"""

import argparse
import os
from dataclasses import replace

import torch
from peers_train import OpenPalm, Rules
from train_common import DTYPES, random_batch, say, sized, step_seconds, table

from openpalm.base.device import processor
from openpalm.plan.devices import measured_cpu
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
HEAD = ("model", "length", "optimizer", "recompute", "predicted s", "measured s", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured step times.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each point")
    how = parser.parse_args()
    say(f"{processor()}; {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    lines = [point(*given, how.dtype, how.steps) for given in POINTS]
    print(table(HEAD, lines))


def point(
    name: str, length: int, optimizer: str, recompute: str, dtype: str, steps: int
) -> tuple[str, ...]:
    """One line of the table; the rates are measured before each point."""
    config = sized(name, length)
    device = measured_cpu(dtype)
    training = replace(
        Training(config, length, rows=1),
        optimizer=optimizer,
        recompute=recompute,
        dtype=dtype,
    )
    time = step_time(training, Layout(), device)
    who = OpenPalm(
        Rules(config, getattr(torch, dtype), CPU),
        optim={"name": optimizer},
        memory={"recompute": recompute},
    )
    batch = random_batch(config.vocab_size, 1, length)
    who.step(batch)
    measured = min(step_seconds(who, batch, 1, CPU) for _ in range(steps))
    parts = ", ".join(f"{part} {s:.3f}" for part, s in time.parts.items() if s)
    rates = f"{device.peak[dtype] / 1e9:.0f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s"
    say(f"{name} {length}: {rates}; predicted {parts}")
    return (
        name,
        str(length),
        optimizer,
        recompute,
        f"{time.total:.3f}",
        f"{measured:.3f}",
        f"{time.total / measured:.2f}",
    )


if __name__ == "__main__":
    main()
