"""Whether a run that is killed many times gives the losses of an uninterrupted run, bit for bit.

    python benchmarks/kill.py [--verb VERB] [--processes 1] [--kills 20] [--steps 80]
                              [--save-every 5] [--seed 0] [--json]

Trains a small model once without interruption, and once killed with SIGKILL at random moments,
with the same command run again after each. --verb is train, sft, dpo, reward, grpo or ppo; the
last two use each rollout for several epochs, so that kills come in the middle of one. Moments are
spread over the whole run and take turns: some time after a process was started (while it imports,
measures, restores), after a row was written, and inside a save, which is recognised by the
unfinished directory of the checkpoint. A kill counts as inside a save if it left such a
directory. With --processes 2 or more both runs are started by torchrun; one of the processes,
drawn at random, is killed, and torchrun (--max-restarts) starts all again. Exits 1 on any
difference.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from openpalm.train.logging.metrics import read_rows

CLOCK = {"elapsed_s", "mfu"}
KINDS = ("started", "row", "save")
PATIENCE_S = 600.0
MANY = 100_000
"""restarts that torchrun may make"""


@dataclass(frozen=True)
class Result:
    """What two runs of the same command came to."""

    kills: int
    places: dict[str, int]
    """what the process was doing when it was killed"""
    rows: int
    rows_after_kills: int
    differing_losses: int
    differing_rows: int
    same_samples: bool
    same_weights: bool
    nothing_left_behind: bool
    """whether every unfinished checkpoint was removed"""
    seconds: float

    @property
    def equal(self) -> bool:
        return (
            self.rows == self.rows_after_kills
            and self.differing_rows == self.differing_losses == 0
            and self.same_samples
            and self.same_weights
            and self.nothing_left_behind
        )


class Run:
    """A run's directory and the command that makes it."""

    def __init__(self, out: Path, verb: str, options: Sequence[str], processes: int = 1):
        self.out, self.processes = out, processes
        given = dict(option.split("=", 1) for option in options if "=" in option)
        self.save_every = int(given["--save-every"])
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1"]
            launch += [f"--nproc-per-node={processes}", f"--max-restarts={MANY}"]
        self.command = [*launch, "-m", "openpalm", verb, *options, f"--out={out}"]
        self.metrics = out / "metrics.jsonl"

    def start(self, stderr: IO[bytes] | int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        # One thread: the same sums in the same order, however busy the machine is.
        return subprocess.Popen(
            self.command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )

    def finish(self) -> float:
        """Runs the command to its end; returns the seconds until its first row.

        Raises RuntimeError with what it said if it failed.
        """
        before, started = self.changed(), time.monotonic()
        with self.start() as process:
            _wait(process, lambda: self.changed() != before)
            first_row_s = time.monotonic() - started
            said = process.communicate()[1].decode(errors="replace")
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {said[-2000:]}")
        return first_row_s

    def changed(self) -> int:
        """When rows were last written, or 0."""
        return self.metrics.stat().st_mtime_ns if self.metrics.exists() else 0

    def step(self) -> int:
        """The last step that has a row."""
        rows = read_rows(self.metrics) if self.metrics.exists() else []
        return max((row["step"] for row in rows), default=0)

    def unfinished(self, process: int) -> bool:
        """Whether that process is inside a save, or was when it was killed."""
        return any((self.out / "checkpoints").glob(f".step-*.partial-{process}"))

    def saves_now(self) -> bool:
        """Whether the newest row is of a step that is saved but has no checkpoint yet."""
        step = self.step()
        saved = (self.out / "checkpoints" / f"step-{step:08d}").exists()
        return step > 0 and step % self.save_every == 0 and not saved

    def clean(self) -> bool:
        """Whether no unfinished directory is left."""
        return not any((self.out / "checkpoints").glob(".*"))

    def columns(self) -> list[dict[str, Any]]:
        """Every row without what a clock said."""
        return [
            {n: v for n, v in row.items() if n not in CLOCK and not n.endswith("_per_s")}
            for row in read_rows(self.metrics)
        ]

    def digest(self, pattern: str) -> str:
        found = sorted(self.out.glob(pattern))
        if not found:  # only pretraining and reinforcement learning write samples
            return ""
        newest = found[-1]
        return hashlib.sha256(newest.read_bytes()).hexdigest()


def kill_once(
    run: Run, kind: str, target: int, startup_s: float, drawn: random.Random
) -> str | None:
    """Starts the command and kills it at a moment of that kind; None if it ended before.

    Otherwise says where it was: in a save, before its first row, or between rows.
    """
    before = run.changed()
    with run.start() as process:
        if kind == "started":
            time.sleep(drawn.uniform(0.0, startup_s))
        else:
            _wait(process, lambda: run.changed() != before and run.step() >= target)
        if kind == "row":
            time.sleep(drawn.uniform(0.0, 0.05))
        if kind == "save":
            _wait(process, lambda: run.unfinished(process.pid))
            time.sleep(drawn.uniform(0.0, 0.06))
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1].decode(errors="replace")
    if ended and process.returncode:
        raise RuntimeError(f"exit {process.returncode}: {said[-2000:]}")
    if ended:
        return None
    if run.unfinished(process.pid):
        return "in a save"
    return "before its first row" if run.changed() == before else "between rows"


def kill_processes(
    run: Run,
    targets: Sequence[int],
    startup_s: float,
    drawn: random.Random,
    tell: Callable[[str], None],
) -> Counter[str]:
    """Starts the command for each target and kills it there."""
    places = Counter[str]()
    for number, target in enumerate(targets, 1):
        kind = KINDS[number % len(KINDS)]
        place = kill_once(run, kind, target, startup_s, drawn)
        if place is not None:
            places[place] += 1
        tell(f"kill {number}: {kind}, step {run.step()}, {place or 'ended before'}")
    return places


def kill_workers(
    run: Run,
    targets: Sequence[int],
    startup_s: float,
    drawn: random.Random,
    tell: Callable[[str], None],
) -> Counter[str]:
    """Starts the command under torchrun, kills one of its processes at each target, lets it end."""
    places = Counter[str]()
    before = run.changed()
    # To a file: a pipe that nobody reads would stop the processes.
    with tempfile.TemporaryFile() as said, run.start(said) as launcher:
        workers: list[int] = []
        for number, target in enumerate(targets, 1):
            kind = KINDS[number % len(KINDS)]
            old = set(workers)
            _wait(launcher, lambda old=old: _new_workers(launcher.pid, run.processes, old))
            workers = _children(launcher.pid)
            if kind == "started":
                time.sleep(drawn.uniform(0.0, startup_s))
            else:
                _wait(launcher, lambda t=target, b=before: run.changed() != b and run.step() >= t)
            if kind == "row":
                time.sleep(drawn.uniform(0.0, 0.05))
            if kind == "save":
                _wait(launcher, lambda w=workers: any(map(run.unfinished, w)) or run.saves_now())
                time.sleep(drawn.uniform(0.0, 0.06))
            if launcher.poll() is not None:
                tell(f"kill {number}: the run had ended before")
                break
            victim = drawn.choice(workers)
            os.kill(victim, signal.SIGKILL)
            place = "before its first row" if run.changed() == before else "between rows"
            place = "in a save" if any(map(run.unfinished, workers)) else place
            places[f"process {workers.index(victim)}, {place}"] += 1
            tell(f"kill {number}: {kind}, step {run.step()}, {place}")
            before = run.changed()
        if launcher.wait():
            said.seek(0)
            end = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"exit {launcher.returncode}: {end}")
    return places


def _new_workers(launcher: int, number: int, old: set[int]) -> bool:
    found = _children(launcher)
    return len(found) == number and not old & set(found)


def _children(process: int) -> list[int]:
    """The processes that it started and that run a program, oldest first."""
    try:
        listed = list(Path(f"/proc/{process}/task").glob("*/children"))
        found = sorted(int(number) for file in listed for number in file.read_text().split())
        return [child for child in found if Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # one ended while we looked
        return []


def _wait(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Until the condition holds or the process ends."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached() and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"nothing happened for {PATIENCE_S:.0f} s")
        time.sleep(0.001)


def prove(
    verb: str,
    options: Sequence[str],
    work: Path,
    *,
    kills: int,
    steps: int,
    save_every: int,
    seed: int,
    processes: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Result:
    """Both runs under `work`, compared."""
    started = time.monotonic()
    options = [
        *options,
        f"--steps={steps}",
        f"--save-every={save_every}",
        f"--eval-every={max(1, steps // 2)}",
        "--dtype=float32",
    ]
    whole = Run(work / "whole", verb, options, processes)
    killed = Run(work / "killed", verb, options, processes)
    startup_s = whole.finish()
    tell(f"the undisturbed run took {time.monotonic() - started:.1f} s")
    drawn = random.Random(seed)
    last = max(1, steps - 2 * save_every)  # the last kills need something left to kill
    targets = sorted(drawn.randint(1, last) for _ in range(kills))
    if processes > 1:
        places = kill_workers(killed, targets, startup_s, drawn, tell)
    else:
        places = kill_processes(killed, targets, startup_s, drawn, tell)
        killed.finish()
    a, b = whole.columns(), killed.columns()
    pairs = list(zip(a, b, strict=False))
    names = ("loss", "val_loss", "val_bits_per_byte", "reward", "val_reward", "kl_coef")
    return Result(
        kills=sum(places.values()),
        places=dict(places),
        rows=len(a),
        rows_after_kills=len(b),
        differing_losses=sum(x.get(n) != y.get(n) for x, y in pairs for n in names),
        differing_rows=sum(x != y for x, y in pairs),
        same_samples=whole.digest("samples.jsonl") == killed.digest("samples.jsonl"),
        same_weights=whole.digest("checkpoints/step-*/model.safetensors")
        == killed.digest("checkpoints/step-*/model.safetensors"),
        nothing_left_behind=killed.clean(),
        seconds=round(time.monotonic() - started, 1),
    )


def pretraining(data: Path) -> list[str]:
    shape = ["--sequence-length=64", "--batch-tokens=256"]
    return [f"--data={data}", "--model=palm-tiny", *shape, "--arch.dropout=0.1"]


VERBS = ("train", "sft", "dpo", "reward", "grpo", "ppo")


def alignment(verb: str, work: Path) -> list[str]:
    """The options of a verb that starts from a small model, and the files they name."""
    base = small_model(work)
    if verb in ("grpo", "ppo"):
        return rollouts(verb, work, base)
    rows = {
        "sft": lambda i: {"prompt": f"Question {i}", "completion": f"Answer {i}."},
        "dpo": lambda i: {"prompt": f"Question {i}", "chosen": f"Yes, {i}.", "rejected": "No."},
    }
    make = rows.get(verb, rows["dpo"])
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(make(i)) + "\n" for i in range(60)), encoding="utf-8")
    return [f"--init={base}", f"--data={data}", "--optim.lr=0.01", "--batch-tokens=384"]


def small_model(work: Path) -> Path:
    """A checkpoint of a byte-level model with random weights."""
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer, initialise

    config = ModelConfig(
        vocab_size=265, dim=32, depth=2, heads=4, head_dim=8, ff_dim=64, context=48
    )
    model = Transformer(config)
    initialise(model, 0)
    Tokenizer.byte().save(work / "tokenizer.json")
    checkpoint.save(
        work / "base", model, tokenizer_json=(work / "tokenizer.json").read_text(encoding="utf-8")
    )
    return work / "base"


def rollouts(verb: str, work: Path, base: Path) -> list[str]:
    """Completions of twelve bytes, and a reward for lower-case letters."""
    prompts = "".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(24))
    (work / "prompts.jsonl").write_text(prompts, encoding="utf-8")
    (work / "pay.py").write_text(
        "def letters(prompt, answer, row):\n    return sum(c.islower() for c in answer)\n",
        encoding="utf-8",
    )
    options = [f"--init={base}", f"--data={work / 'prompts.jsonl'}"]
    options += [f"--reward={work / 'pay.py'}:letters", "--max-new-tokens=12", "--optim.lr=0.01"]
    options += ["--epochs-per-rollout=2", "--minibatches=2", "--prompts-per-rollout=4"]
    own = {
        "grpo": ["--advantage=dapo", "--num-completions=4", "--kl=k3"],
        "ppo": ["--critic=separate", "--value-bins=21", "--num-completions=4", "--target-kl=1"],
    }
    return [*options, *own[verb]]


def prepare(work: Path) -> Path:
    """A part of the built-in corpus, so that evaluations stay short."""
    from openpalm.data.corpus.builtin import python_docs
    from openpalm.data.prepare.preparation import PrepareRequest
    from openpalm.data.prepare.preparation import prepare as prepare_data

    texts = [document.text for document in itertools.islice(python_docs(), 40)]
    (work / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    out = work / "data"
    prepare_data(
        PrepareRequest(inputs=[str(work / "text.txt")], out=out, tokenizer="byte", val="tail:0.05")
    )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kills a run again and again; compares losses.")
    parser.add_argument("--verb", choices=VERBS, default="train")
    parser.add_argument("--processes", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--data", type=Path, help="prepared data; not set takes built-in text")
    parser.add_argument("--work", type=Path, help="new folder to keep both runs in")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs (default: 20)")
    parser.add_argument("--steps", type=int, default=80, help="of the run (default: 80)")
    parser.add_argument("--save-every", type=int, default=5, help="steps (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        given = (
            pretraining(options.data or prepare(work))
            if options.verb == "train"
            else alignment(options.verb, work)
        )
        result = prove(
            options.verb,
            given,
            work,
            kills=options.kills,
            steps=options.steps,
            save_every=options.save_every,
            seed=options.seed,
            processes=options.processes,
            tell=lambda line: print(line, file=sys.stderr),
        )
    if options.json:
        print(json.dumps(asdict(result) | {"equal": result.equal}))
    else:
        for place, count in result.places.items():
            print(f"killed {place:<24}{count}")
        for name, value in asdict(result).items():
            if name == "places":
                continue
            print(f"{name.replace('_', ' '):<31}{value}")
        print(f"{'':<31}{'equal bit for bit' if result.equal else 'DIFFERENT'}")
    return 0 if result.equal else 1


if __name__ == "__main__":
    sys.exit(main())
