"""How long a step waits for a checkpoint: written in the background by several processes, or at
once by one.

    python benchmarks/save_stall.py [--model palm-14m] [--processes 2] [--steps 16] [--json]

Reads the rows of two short runs that save every fourth step. The wait after a step is the time from
its row to the next one, less the next step itself. What a save takes from the processor while it is
written shows in the steps after it.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kill import Run, prepare

from openpalm.train.logging.metrics import read_rows

EVERY = 4
TOKENS = 256


@dataclass(frozen=True)
class Result:
    """Median seconds over the steps of a run."""

    processes: int
    checkpoint_mb: float
    wait_after_saved_step_s: float
    wait_after_other_steps_s: float
    step_after_save_s: float
    other_steps_s: float


def measured(work: Path, data: Path, model: str, processes: int, steps: int) -> Result:
    options = [f"--data={data}", f"--model={model}", "--dtype=float32", "--sequence-length=64"]
    options += [f"--batch-tokens={TOKENS}", f"--steps={steps}", f"--save-every={EVERY}"]
    run = Run(work / f"run-{processes}", "train", [*options, f"--eval-every={steps}"], processes)
    run.finish()
    rows = {row["step"]: row for row in read_rows(run.metrics) if "loss" in row}
    waits: dict[bool, list[float]] = {True: [], False: []}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(2, steps):  # the first step allocates memory
        taken = TOKENS / rows[step + 1]["tokens_per_s"]
        saved = step % EVERY == 0
        waits[saved].append(rows[step + 1]["elapsed_s"] - rows[step]["elapsed_s"] - taken)
        seconds[saved].append(taken)
    newest = sorted((run.out / "checkpoints").glob("step-*"))[-1]
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    figures = [
        statistics.median(found[saved]) for found in (waits, seconds) for saved in (True, False)
    ]
    return Result(processes, round(size / 1e6, 1), *(round(figure, 3) for figure in figures))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How long a step waits for a checkpoint.")
    parser.add_argument("--model", default="palm-14m", help="preset (default: palm-14m)")
    parser.add_argument("--processes", type=int, default=2, help="of the first run (default: 2)")
    parser.add_argument("--steps", type=int, default=16, help="of each run (default: 16)")
    parser.add_argument("--data", type=Path, help="prepared data; not set takes built-in text")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = options.data or prepare(work)
        results = [
            measured(work, data, options.model, processes, options.steps)
            for processes in (options.processes, 1)
        ]
    for result in results:
        if options.json:
            print(json.dumps(asdict(result)))
            continue
        for name, value in asdict(result).items():
            print(f"{name.replace('_', ' '):<28}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
