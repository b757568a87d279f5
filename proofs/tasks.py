"""What the proofs through the command line share: commands, drawn answers, figures and bounds.

Each of them trains a base model, fine-tunes it and aligns it by `openpalm` commands alone, and
looks at the checkpoints with the engine. Writes runs/prove/NAME.json, one object a seed; ends with
status 1 where a seed's figure misses its bound.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.rollout_batch import Completion, collate_completions
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.transformer import Transformer

OUT = Path("runs/prove")
ROWS = 64

Figures = dict[str, float]


def openpalm(*words: object) -> None:
    """Runs a verb as a program of its own. Raises CalledProcessError where it fails."""
    said = [str(word) for word in words]
    print(f"$ openpalm {shlex.join(said)}", flush=True)
    quiet = os.environ | {"COLUMNS": "100"}
    subprocess.run([sys.executable, "-m", "openpalm", *said], check=True, env=quiet)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Speaker:
    """A run's newest checkpoint, or one of a step, answering questions in the chat template."""

    def __init__(self, run: Path, step: int | None = None):
        name = "" if step is None else f"checkpoints/{checkpoint.step_name(step)}"
        directory = checkpoint.resolve(run / name)
        loaded = checkpoint.load(directory)
        assert isinstance(loaded, Transformer)
        self.model, self.tokenizer = loaded, Tokenizer.load(directory)
        self.stops = stop_ids(self.tokenizer)
        self._engine = Engine(loaded, slots=ROWS, prefill_tokens=2048)

    def answers(
        self, questions: Sequence[str], *, max_new_tokens: int, temperature: float = 1.0, seed: int
    ) -> list[Completion]:
        """One to each question, each drawn with a seed of its own."""
        requests, made = [], []
        for i, question in enumerate(questions):
            ids = render(
                self.tokenizer, [Message("user", question)], add_generation_prompt=True
            ).ids
            how = Sampling(temperature, seed=seed * len(questions) + i)
            requests.append(Request(ids, max_new_tokens, how, self.stops))
        for request, ids in zip(requests, self._engine.completions(requests), strict=True):
            made.append(Completion(len(made), request.ids, ids, [], ids[-1] in self.stops))
        return made

    def text(self, answer: Completion) -> str:
        return self.tokenizer.decode([i for i in answer.ids if i not in self.stops])

    @torch.no_grad()
    def log_probs(self, answers: Sequence[Completion]) -> torch.Tensor:
        """Of each whole answer, nats, [answers]."""
        parts = (answers[i : i + ROWS] for i in range(0, len(answers), ROWS))
        return torch.cat(
            [evaluate(self.model, *collate_completions(p)).log_probs.sum(-1) for p in parts]
        )


def prove(
    name: str, run: Callable[[Path, int], Figures], bounds: dict[str, float], about: str
) -> int:
    """Runs seeds of a task; `bounds`: figure -> least value, -figure -> minus its greatest."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    asked = parser.parse_args()
    results, misses = [], []
    for seed in range(asked.first, asked.first + asked.seeds):
        folder = OUT / name / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # an older proof's runs would be gone on with
        folder.mkdir(parents=True)
        began, used = time.perf_counter(), cpu_seconds()
        figures = run(folder, seed)
        row = {"seed": seed} | {figure: round(value, 4) for figure, value in figures.items()}
        row["seconds"] = round(time.perf_counter() - began)
        row["cpu_seconds"] = round(cpu_seconds() - used)
        results.append(row)
        print(json.dumps(row), flush=True)
        misses += [f"seed {seed}: {miss}" for miss in missed(figures, bounds)]
        (OUT / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for miss in misses:
        print(f"{name}: {miss}", file=sys.stderr)
    return 1 if misses else 0


def cpu_seconds() -> float:
    """Of this process and those it ran: what a shared machine's clock does not tell."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def missed(figures: Figures, bounds: dict[str, float]) -> list[str]:
    """The bounds that the figures miss; a figure that is not a number misses."""
    told = []
    for bound, least in bounds.items():
        sign, figure = (-1, bound[1:]) if bound.startswith("-") else (1, bound)
        if not sign * figures[figure] >= least:
            limit = f"{'most' if sign < 0 else 'least'} {abs(least):g}"
            told.append(f"{figure} {figures[figure]:.4f}, must be at {limit}")
    return told
