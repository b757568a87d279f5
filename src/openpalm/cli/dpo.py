"""`openpalm dpo`: a fine-tuned checkpoint and pairs of answers in, one that prefers alike out."""

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.align.config import WITHOUT_REFERENCE, DpoSettings
from openpalm.settings import parse

if TYPE_CHECKING:
    from openpalm.align.pairs import PairRecord
    from openpalm.train.run import Outcome, Probe


def run(argv: Sequence[str]) -> None:
    settings = parse(
        DpoSettings,
        argv,
        verb="dpo",
        about="Trains on pairs of answers, a chosen and a rejected one to each prompt: a .jsonl of "
        '{"prompt": ..., "chosen": ..., "rejected": ...} or of preference records. The reference '
        "is the checkpoint that --init names.",
        examples=[
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/preferred --epochs 1",
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/s --epochs 1 --loss simpo",
        ],
    )
    from openpalm.cli.train import report

    report(prefer(settings), settings)


def prefer(settings: DpoSettings, label: str = "dpo") -> "Outcome":
    """Composes the run: weights, pairs with what the reference thinks of them, THE loop."""
    from rich.console import Console

    from openpalm import checkpoint
    from openpalm.align.dpo import PairObjective
    from openpalm.align.pairs import PairLoader, records, with_reference
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.data.pair_files import read_pairs
    from openpalm.distributed import pick_device
    from openpalm.train.run import Job
    from openpalm.train.run import run as run_job

    directory, tokenizer, start = fine_tuning_start(settings)
    length = settings.sequence_length or start.config.context
    given = read_pairs(settings.data)
    for reason, count in given.unused.items():
        print(f"{label}: {count} records are not used: {reason}", file=sys.stderr)
    pairs, too_long = records(tokenizer, given.items, length)
    if too_long:
        print(
            f"{label}: {too_long} of {len(given.items)} pairs are longer than {length} tokens and "
            "are left out; --sequence-length takes more",
            file=sys.stderr,
        )
    if settings.loss not in WITHOUT_REFERENCE:
        with Console(stderr=True).status(f"what {directory} thinks of {len(pairs)} pairs"):
            reference = checkpoint.load(directory, str(pick_device(settings.device)))
            pairs = with_reference(reference, pairs)
            del reference
    trained, measured = held_out(pairs)
    job = Job(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: PairLoader(
            trained, rows=max(1, shape.rows // 2), seed=settings.seed
        ),
        sequences_per_epoch=2 * len(trained),
        learning_rate=start.learning_rate / 10,
        objective=PairObjective(settings),
        unit="pairs",
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        parent_fixed=settings.loss not in WITHOUT_REFERENCE,
        probes=[_held_out_probe(measured, settings)] if measured else [],
        label=label,
    )
    return run_job(settings, job)


def _held_out_probe(pairs: "Sequence[PairRecord]", settings: DpoSettings) -> "Probe":
    """How often the held-out chosen answer has the greater implicit reward."""
    import torch

    from openpalm.align.dpo import PairObjective
    from openpalm.align.pairs import collate
    from openpalm.model.transformer import Transformer
    from openpalm.train.run import Probe

    objective, batch = PairObjective(settings), collate(pairs)

    def look(model: Transformer, dtype: torch.dtype) -> dict[str, float]:
        device = model.embedding.device
        with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
            loss, metrics = objective.loss(model, batch.to(device))
        values = {"loss": loss.item(), **metrics}
        return {f"val_{name}": value / len(pairs) for name, value in values.items()}

    return Probe(
        look,
        tell=lambda row: (
            f"held-out pairs: loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.3f}, "
            f"reward margin {row['val_reward_margin']:.3f}"
        ),
    )
