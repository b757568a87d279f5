"""`openpalm train`: prepared data in, a run directory with checkpoints out."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.base.settings import parse, spell
from openpalm.train.config import PretrainSettings, TrainSettings

if TYPE_CHECKING:
    from openpalm.data.batches.token_mixture import TokenSets
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome

EXAMPLES = [
    "openpalm train --model palm-tiny --data data/docs --out runs/tiny --steps 200",
    "openpalm train --model palm-14m --data data/docs --out runs/laptop --minutes 30",
    "openpalm train --model palm-14m --data mixture.yaml --out runs/mixed --epochs 2",
    "openpalm train --depth 4 --data data/docs --out runs/d4",
    "openpalm train --config configs/laptop.yaml --data data/docs --out runs/laptop",
    "openpalm train --config 6B_roto_256.json --data data/pile --out runs/gpt-j",
    "openpalm train --init runs/laptop --data data/more --out runs/more --steps 500",
    "openpalm train --config runs/tiny/config.yaml --out runs/again",
]


def run(argv: Sequence[str]) -> None:
    settings = parse(
        PretrainSettings,
        argv,
        verb="train",
        about="Trains a model on prepared data. The same command resumes an interrupted run; "
        "a finished run is not changed.",
        examples=EXAMPLES,
        foreign=_mesh_settings,
    )
    report(pretrain(settings), settings)


def _mesh_settings(path: Path) -> dict[str, Any] | None:
    """The settings of a configuration of mesh-transformer-jax; None for any other file."""
    from textwrap import fill

    from openpalm.convert.gptj.mesh_config import read_mesh_config

    found = read_mesh_config(path, PretrainSettings.__dataclass_fields__)
    if found is None:
        return None
    print(f"train: {path}: a configuration of mesh-transformer-jax", file=sys.stderr)
    for line in found.lines:
        print(fill(f"train: {line}", 98, break_on_hyphens=False), file=sys.stderr)
    return found.values


def pretrain(settings: PretrainSettings, label: str = "train") -> "Outcome":
    """Composes the run: data, initial weights, batches, probes, the training loop."""
    from openpalm.cli.common import join_processes, warn_of_memory, weights_path
    from openpalm.data.batches.loader import token_loader
    from openpalm.data.batches.token_mixture import open_sets
    from openpalm.train.initial_weights import starting_point
    from openpalm.train.probes import BestBy
    from openpalm.train.run import run_training
    from openpalm.train.sizing.scaling import scaled
    from openpalm.train.spec import TrainSpec

    join_processes(settings)
    sets = open_sets(settings.data)
    tokenizer, tokens = sets.datasets[0].tokenizer(), sets.tokens("train")
    if settings.depth is not None:
        settings, derived = scaled(settings, tokenizer.vocab_size, len(tokens))
        _print_derived(settings.depth, derived)
    init = weights_path(settings.init) if settings.init else None
    start = starting_point(settings, init, tokenizer, force=settings.force)
    if start.unsure:
        print(f"{label}: warning: {start.unsure}", file=sys.stderr)
    length = settings.sequence_length or start.config.context
    shares, draws = sets.shares(length), sets.draws(length, settings.seed)
    documents = sets.documents("train") if settings.document_mask else None
    for name, share in zip(sets.names, shares, strict=True) if len(shares) > 1 else ():
        print(f"{label}: {name}: {share:,} of {sum(shares):,} sequences an epoch", file=sys.stderr)
    spec = TrainSpec(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: token_loader(
            tokens,
            sequence_length=shape.sequence_length,
            rows=shape.rows,
            seed=settings.seed,
            rank=shape.rank,
            world_size=shape.processes,
            draws=draws,
            documents=documents,
        ),
        sequences_per_epoch=sum(shares),
        learning_rate=start.learning_rate,
        tokenizer_json=(sets.datasets[0].path / "tokenizer.json").read_text(encoding="utf-8"),
        data_hash=sets.digest,
        parent=start.parent,
        parent_hash=start.parent_hash,
        probes=_probes(settings, sets, tokenizer, length),
        best=BestBy() if _validates(sets) else None,
        label=label,
    )
    warn_of_memory(settings, spec)
    return run_training(settings, spec)


def _print_derived(depth: int | None, derived: dict[str, Any]) -> None:
    """The settings that follow from --depth, as the options that would set them."""
    from textwrap import fill

    options = " ".join(f"{spell(name)}={value}" for name, value in derived.items())
    print(fill(f"--depth {depth}: {options}", 98, break_on_hyphens=False), file=sys.stderr)


def _probes(
    settings: PretrainSettings, sets: "TokenSets", tokenizer: "Tokenizer", length: int
) -> "list[Probe]":
    """Validation loss, if every dataset has a validation split, samples and tasks."""
    from openpalm.cli.common import task_probes
    from openpalm.evaluate.probes import first_words, sample_probe, validation_probe

    given = settings.sample_prompts
    prompts = [given] if isinstance(given, str) else given or first_words(sets.datasets[0])
    probes = [sample_probe(tokenizer, prompts), *task_probes(settings, tokenizer)]
    if not _validates(sets):
        return probes
    return [validation_probe(sets, length, document_mask=settings.document_mask), *probes]


def _validates(sets: "TokenSets") -> bool:
    """Whether every dataset has a validation split."""
    return all(dataset.manifest.splits["val"].tokens > 1 for dataset in sets.datasets)


def report(outcome: "Outcome", settings: TrainSettings) -> None:
    """Prints the last line of a run: its newest checkpoint."""
    if outcome.was_finished:
        print(f"{settings.out}: finished at step {outcome.step} before; nothing to do")
        return
    _curve(settings.out)
    print(outcome.checkpoint)


def _curve(run: Path) -> None:
    """Draws the loss as a small plot, in a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from openpalm.report.terminal_plots import print_loss

        print_loss(run, console)
