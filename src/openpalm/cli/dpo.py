"""`openpalm dpo`: a fine-tuned checkpoint and judged answers in, one that prefers alike out."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpalm.align.config import WITHOUT_REFERENCE, DpoSettings
from openpalm.base.settings import parse
from openpalm.errors import count_of

if TYPE_CHECKING:
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.objective import Objective
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        DpoSettings,
        argv,
        verb="dpo",
        about="Trains on pairs of answers, a chosen and a rejected one to each prompt: a .jsonl of "
        '{"prompt": ..., "chosen": ..., "rejected": ...} or of preference records; for --loss kto '
        'on verdicts, {"prompt": ..., "completion": ..., "label": true or false}. The reference is '
        "the checkpoint that --init names.",
        examples=[
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/preferred --epochs 1",
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/s --epochs 1 --loss simpo",
            "openpalm dpo --init runs/chat --data thumbs.jsonl --out runs/k --epochs 1 --loss kto",
        ],
    )
    from openpalm.cli.train import report

    report(prefer(settings), settings)


def prefer(settings: DpoSettings, label: str = "dpo") -> "Outcome":
    """Composes the run: weights, judgements with what the reference thinks of them, THE loop."""
    from openpalm.align.pairs.pairs import PairLoader
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.train.run import run_training
    from openpalm.train.spec import TrainSpec

    directory, tokenizer, start = fine_tuning_start(settings)
    length = settings.sequence_length or start.config.context
    unit, rows, objective, collate = _kind(settings)
    trained, measured = held_out(_judgements(settings, directory, tokenizer, length, label))
    spec = TrainSpec(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: PairLoader(
            trained, rows=max(1, shape.rows // rows), seed=settings.seed, collate=collate
        ),
        sequences_per_epoch=rows * len(trained),
        learning_rate=start.learning_rate / 10,
        objective=objective,
        items_per_step=None  # the reference point of kto is a mean over a microbatch
        if settings.loss == "kto"
        else lambda shape: max(1, shape.rows // rows) * shape.accumulation,
        unit=unit,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        parent_fixed=settings.loss not in WITHOUT_REFERENCE,
        probes=[_held_out_probe(collate(measured), objective, unit)] if measured else [],
        label=label,
    )
    return run_training(settings, spec)


def _kind(settings: DpoSettings) -> "tuple[str, int, Objective[Any], Callable[..., Any]]":
    """What is judged, in how many rows, the loss of it and how it becomes a batch."""
    from openpalm.align.pairs import dpo, kto, pairs

    if settings.loss == "kto":
        return "verdicts", 1, kto.VerdictObjective(settings), kto.collate
    return "pairs", 2, dpo.PairObjective(settings), pairs.collate_shared


def _judgements(
    settings: DpoSettings, directory: Path, tokenizer: "Tokenizer", length: int, label: str
) -> "Sequence[Any]":
    """What fits of the file, with the reference's log-probabilities; reports what is left out."""
    from rich.console import Console

    from openpalm.align.pairs import kto, pairs
    from openpalm.base.device import pick_device
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.pair_files import read_pairs
    from openpalm.data.rows.verdict_files import read_verdicts

    unit, made = ("verdicts", kto) if settings.loss == "kto" else ("pairs", pairs)
    given = (read_verdicts if settings.loss == "kto" else read_pairs)(settings.data)
    found = made.records(tokenizer, given, length)
    fitting = report_unused(label, settings.data, found, unit.removesuffix("s")).items
    if settings.loss == "kto" and len(kinds := {verdict.label for verdict in fitting}) == 1:
        kind, other = ("good", "bad") if kinds == {1.0} else ("bad", "good")
        print(
            f"{label}: {count_of(len(fitting), 'verdict')}, all {kind}; without {other} ones kto "
            f"only makes these answers {'likelier' if kind == 'good' else 'less likely'}",
            file=sys.stderr,
        )
    if settings.loss in WITHOUT_REFERENCE:
        return fitting
    amount = count_of(len(fitting), unit.removesuffix("s"))
    with Console(stderr=True).status(f"what {directory} thinks of {amount}"):
        reference = checkpoint.load(directory, str(pick_device(settings.device)))
        return made.with_reference(reference, fitting)


def _held_out_probe(batch: Any, objective: "Objective[Any]", unit: str) -> "Probe":
    """How often what is held out is judged alike, and by how much."""
    import torch

    from openpalm.model.transformer import Transformer
    from openpalm.train.probes import Probe

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, float]:
        device = model.embedding.device
        with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
            loss, metrics = objective.loss(model, batch.to(device))
        values = {"loss": loss.item(), **metrics}
        return {f"val_{name}": value / objective.count(batch) for name, value in values.items()}

    return Probe(
        measure,
        describe=lambda row: (
            f"held-out {unit}: loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.3f}, "
            f"reward margin {row['val_reward_margin']:.3f}"
        ),
    )
