"""`openpalm train`: prepared data in, a run directory with checkpoints out."""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from openpalm.settings import parse, spell
from openpalm.train.config import TrainSettings
from openpalm.train.scaling import scaled

if TYPE_CHECKING:
    from openpalm.train.run import Outcome

EXAMPLES = [
    "openpalm train --model palm-tiny --data data/docs --out runs/tiny --steps 200",
    "openpalm train --model palm-14m --data data/docs --out runs/laptop --minutes 30",
    "openpalm train --depth 4 --data data/docs --out runs/d4",
    "openpalm train --config configs/laptop.yaml --data data/docs --out runs/laptop",
    "openpalm train --init runs/laptop --data data/more --out runs/more --steps 500",
    "openpalm train --config runs/tiny/config.yaml --out runs/again",
]


PROMPTS = ["The", "Return a", "This module"]
"""What samples.jsonl continues."""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        TrainSettings,
        argv,
        verb="train",
        about="Trains a model on prepared data. The same command goes on where a run stopped; "
        "a finished run is left as it is.",
        examples=EXAMPLES,
    )
    report(pretrain(settings), settings)


def pretrain(settings: TrainSettings, label: str = "train") -> "Outcome":
    """Composes the run: data, start, what is looked at on the way."""
    from openpalm.cli.common import sample_probe, validation_probe, weights_path
    from openpalm.data.loader import TokenLoader
    from openpalm.data.shards import open_dataset
    from openpalm.train.run import Job
    from openpalm.train.run import run as run_job
    from openpalm.train.start import starting_point

    dataset = open_dataset(settings.data)
    tokenizer = dataset.tokenizer()
    tokens = dataset.tokens("train")
    if settings.depth is not None:
        settings, derived = scaled(settings, tokenizer.vocab_size, len(tokens))
        told = " ".join(f"{spell(name)}={value}" for name, value in derived.items())
        print(
            fill(f"--depth {settings.depth}: {told}", 98, break_on_hyphens=False), file=sys.stderr
        )
    init = weights_path(settings.init) if settings.init else None
    start = starting_point(settings, init, tokenizer)
    length = settings.sequence_length or start.config.context
    probes = [sample_probe(tokenizer, PROMPTS)]
    if len(dataset.tokens("val")) > 1:
        probes.insert(0, validation_probe(dataset, length))
    job = Job(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: TokenLoader(
            tokens, sequence_length=shape.sequence_length, rows=shape.rows, seed=settings.seed
        ),
        sequences_per_epoch=max(1, len(tokens) // length),
        learning_rate=start.learning_rate,
        tokenizer_json=(dataset.path / "tokenizer.json").read_text(encoding="utf-8"),
        data_hash=dataset.manifest.digest,
        parent_hash=start.parent_hash,
        probes=probes,
        label=label,
    )
    return run_job(settings, job)


def report(outcome: "Outcome", settings: TrainSettings) -> None:
    """The last line of a run."""
    if outcome.was_finished:
        print(f"{settings.out}: finished at step {outcome.step} before; nothing to do")
        return
    _curve(settings.out)
    print(outcome.checkpoint)


def _curve(run: Path) -> None:
    """The loss as a small plot, where somebody looks at a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from openpalm.report.terminal import print_loss

        print_loss(run, console)
