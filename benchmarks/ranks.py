"""Weak scaling on one machine: work of a process stays the same, the number of processes grows.

    python benchmarks/ranks.py [--model palm-5m] [--processes 1,2] [--rounds 3] [--steps 8]
    python benchmarks/ranks.py --bytes [--processes 2,4,8]

The first form prints tokens/s of each number of processes, with one thread each, in interleaved
rounds: the median, its ratio to one process, and the share of a step that waits for the data. The
second counts the bytes that a process sends in a step and compares them with the formula for FSDP,

    all-gather      (N + blocks) b (n - 1) / n      forward, and the blocks again for backward
    reduce-scatter  N 4 (n - 1) / n                 gradients, in float32

with N parameters of b bytes on n processes, for each microbatch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))


class SentBytes(TorchDispatchMode):
    """Bytes that this process sends in collectives of n processes, by kind."""

    def __init__(self, processes: int):
        super().__init__()
        self.share = (processes - 1) / processes
        self.sent = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for kind, place in (("allgather", 0), ("reduce_scatter", 1)):
            # Small values travel in lists of tensors: they are not counted.
            if "c10d" in name and kind in name and isinstance(args[place], torch.Tensor):
                self.sent[kind] += round(args[place].nbytes * self.share)
        return func(*args, **(kwargs or {}))


def work(model: str, rows: int, steps: int, counts_bytes: bool) -> None:
    """What one process of a measurement does; the main one prints a line of JSON."""
    from dataclasses import replace

    from layout_runs import trainer_for

    from openpalm.model.config import PRESETS

    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    config = replace(PRESETS[model].config, context=256)
    trainer = trainer_for({}, config=config, accumulation=1, sequences=rows * size)
    waited, original = 0.0, trainer.loader

    class Timed:
        def __next__(self) -> Any:
            nonlocal waited
            began = time.perf_counter()
            batch = next(original)
            waited += time.perf_counter() - began
            return batch

    trainer.loader = Timed()  # type: ignore[assignment]
    trainer.train_step()
    if counts_bytes:
        with SentBytes(size) as counter:
            trainer.train_step()
        total = sum(p.numel() for p in trainer.model.parameters())
        blocks = sum(p.numel() for p in trainer.model.blocks.parameters())
        share = (size - 1) / size
        computed = {"allgather": 4 * (total + blocks) * share, "reduce_scatter": 4 * total * share}
        found: dict[str, Any] = {"sent": dict(counter.sent), "computed": computed}
    else:
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        seconds = time.perf_counter() - began
        tokens = steps * rows * size * config.context
        found = {"tokens_per_s": tokens / seconds, "waited": waited / seconds}
    if trainer.world.is_main:
        print(json.dumps(found))


def measured(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--standalone", __file__, "--worker", "--model", arguments.model]
    command += [
        "--rows",
        str(arguments.rows),
        "--steps",
        str(arguments.steps),
        *(["--bytes"] if arguments.bytes else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="palm-5m")
    parser.add_argument("--processes", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="sequences of 256 tokens a process")
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.model, arguments.rows, arguments.steps, arguments.bytes)
        return
    given = arguments.processes or ("2,4,8" if arguments.bytes else "1,2")
    sizes = [int(size) for size in given.split(",")]
    if arguments.bytes:
        print(f"{'processes':>9} {'collective':>16} {'MB sent':>9} {'computed':>9} {'ratio':>7}")
        for size in sizes:
            found = measured(size, arguments)
            for kind, computed in found["computed"].items():
                sent = found["sent"][kind]
                ratio = sent / computed
                print(f"{size:9} {kind:>16} {sent / 1e6:9.2f} {computed / 1e6:9.2f} {ratio:7.3f}")
        return
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    waits: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(arguments.rounds):
        for size in sizes:
            found = measured(size, arguments)
            rates[size].append(found["tokens_per_s"])
            waits[size].append(found["waited"])
    first = statistics.median(rates[sizes[0]])
    print(f"{'processes':>9} {'tokens/s':>10} {'ratio':>7} {'waits for data':>15}")
    for size in sizes:
        rate, wait = statistics.median(rates[size]), statistics.median(waits[size])
        print(f"{size:9} {rate:10,.0f} {rate / first:7.2f} {wait:15.2%}")


if __name__ == "__main__":
    main()
