"""Whether a damaged checkpoint is ever loaded silently: files cut or changed at random places.

    python benchmarks/damage_checkpoints.py [RUN] [--processes 1] [--damages 200] [--seed 0]
                                           [--json]

RUN is a run with at least two checkpoints; without one a small run is trained, on --processes
processes. Each time one file
of a copy of its newest checkpoint is cut at, or changed in, a random byte. Then loading the
checkpoint must fail, and loading the run must return the previous checkpoint with a warning. Any
other outcome is counted, and exits 1.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import verify
from openpalm.cli.main import main as command_line
from openpalm.errors import CheckpointError
from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Result:
    """What became of the damages."""

    damages: int
    cut: int
    changed: int
    files: dict[str, int]
    refused: int
    fell_back_and_said_so: int
    silent_loads: int
    """of the damaged checkpoint, by its own path or through its run"""
    other_errors: int

    @property
    def good(self) -> bool:
        clean = self.silent_loads == self.other_errors == 0
        return clean and self.refused == self.fell_back_and_said_so == self.damages


def damaged(content: bytes, drawn: random.Random) -> tuple[str, int, bytes]:
    """What was done, at which byte, and the file's bytes after it."""
    at = drawn.randrange(len(content))
    if drawn.random() < 0.5:
        return "cut", at, content[:at]
    other = content[at] ^ drawn.randrange(1, 256)
    return "changed", at, content[:at] + bytes([other]) + content[at + 1 :]


def same_weights(a: Transformer, b: Transformer) -> bool:
    other = dict(b.named_parameters())
    return all(torch.equal(value, other[name]) for name, value in a.named_parameters())


def load_directly(newest: Path) -> str:
    try:
        verify(newest, training=True)  # as a run that continues
        openpalm.load(newest)
    except CheckpointError:
        return "refused"
    except Exception as error:
        return f"other error: {error!r}"
    return "silent"


def load_run(run: Path, newest: Path, previous: Transformer) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            model = openpalm.load(checkpoint.resolve(run, training=True))
    except Exception as error:
        return f"other error: {error!r}"
    warned = (
        "passing over a damaged checkpoint" in said.getvalue() and str(newest) in said.getvalue()
    )
    return "fell back" if warned and same_weights(model, previous) else "silent"


def prove(run: Path, work: Path, *, damages: int, seed: int) -> Result:
    """Damages a copy of the newest checkpoint of `run`, made under `work`.

    Raises CheckpointError if the run has fewer than two whole checkpoints.
    """
    found = checkpoint.steps(run)[-2:]
    if len(found) < 2:
        raise CheckpointError(f"{run}: has {len(found)} checkpoints, two are needed")
    copied = work / "copied"
    for directory in found:
        verify(directory)
        shutil.copytree(directory, copied / "checkpoints" / directory.name)
    before, newest = checkpoint.steps(copied)
    previous = openpalm.load(before)
    if same_weights(openpalm.load(copied), previous):
        raise CheckpointError(f"{run}: its two newest checkpoints hold the same weights")

    drawn = random.Random(seed)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    counts, touched = Counter[str](), Counter[str]()
    for _ in range(damages):
        file = drawn.choice(files)
        content = file.read_bytes()
        kind, at, bad = damaged(content, drawn)
        file.write_bytes(bad)
        name = file.relative_to(newest).as_posix()
        touched[name] += 1
        counts[kind] += 1
        for outcome in (load_directly(newest), load_run(copied, newest, previous)):
            counts[outcome.partition(":")[0]] += 1
            if outcome not in ("refused", "fell back"):
                print(f"{name} {kind} at {at}: {outcome}", file=sys.stderr)
        file.write_bytes(content)
    verify(newest)
    return Result(
        damages=damages,
        cut=counts["cut"],
        changed=counts["changed"],
        files=dict(sorted(touched.items())),
        refused=counts["refused"],
        fell_back_and_said_so=counts["fell back"],
        silent_loads=counts["silent"],
        other_errors=counts["other error"],
    )


def train_small(work: Path, processes: int) -> Path:
    """A run of a few steps on a text of its own, with two checkpoints."""
    (work / "text.txt").write_text("A few words, again and again.\n" * 400, encoding="utf-8")
    data, run = str(work / "data"), work / "run"
    source = str(work / "text.txt")
    with contextlib.redirect_stdout(sys.stderr):
        status = command_line(["data", "prepare", source, f"--out={data}", "--tokenizer=byte"])
        words = "--model=palm-tiny --steps=4 --save-every=2 --eval-every=4 --dtype=float32"
        words += " --sequence-length=32 --batch-tokens=128"
        train = ["train", f"--data={data}", f"--out={run}", *words.split()]
        if processes == 1:
            status = status or command_line(train)
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "-m", "openpalm", *train]
        status = status or subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if status:
        raise SystemExit(status)
    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Damages checkpoints; counts silent loads.")
    parser.add_argument("run", type=Path, nargs="?", help="run; not set trains a small one")
    parser.add_argument("--processes", type=int, default=1, help="of that run (default: 1)")
    parser.add_argument("--damages", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        try:
            run = options.run or train_small(work, options.processes)
            result = prove(run, work, damages=options.damages, seed=options.seed)
        except CheckpointError as error:
            print(f"tear: error: {error}", file=sys.stderr)
            return error.exit_status
    if options.json:
        print(json.dumps(asdict(result) | {"good": result.good}))
    else:
        for name, value in asdict(result).items():
            if name != "files":
                print(f"{name.replace('_', ' '):<24}{value}")
        for name, count in result.files.items():
            print(f"  {name:<24}{count:>4}")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
