"""`openpalm sft`: a checkpoint and conversations in, a model that answers out."""

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.settings import parse
from openpalm.train.config import TrainSettings

if TYPE_CHECKING:
    from openpalm.data.loader import Record
    from openpalm.train.run import Outcome, Probe


def run(argv: Sequence[str]) -> None:
    settings = parse(
        TrainSettings,
        argv,
        verb="sft",
        about="Fine-tunes a checkpoint on conversations: a .jsonl whose lines are "
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}. '
        "The loss is on what the assistant says and on its end marker.",
        examples=[
            "openpalm sft --init runs/tiny --data questions.jsonl --out runs/chat --epochs 2",
            "openpalm sft --init runs/tiny --data questions.jsonl --out runs/chat2 --minutes 5",
        ],
    )
    from openpalm.cli.train import report

    report(finetune(settings), settings)


def finetune(settings: TrainSettings, label: str = "sft") -> "Outcome":
    """Composes the run: weights, conversations as records, THE loop."""
    from openpalm import checkpoint
    from openpalm.align.sft import records
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.data.conversation import read_conversations
    from openpalm.data.loader import RecordLoader, truncated
    from openpalm.train.run import Job
    from openpalm.train.run import run as run_job

    directory, tokenizer, start = fine_tuning_start(settings)
    length = settings.sequence_length or start.config.context
    everything = records(tokenizer, read_conversations(settings.data))
    trained, measured = held_out(everything)
    if cut := truncated(everything, length):
        print(
            f"{label}: {cut} of {len(everything)} conversations are longer than {length} tokens "
            "and are cut at the end; --sequence-length takes more",
            file=sys.stderr,
        )
    measurable = any(any(record.loss_mask[1 : length + 1]) for record in measured)
    job = Job(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: RecordLoader(
            trained, rows=shape.rows, seed=settings.seed, sequence_length=shape.sequence_length
        ),
        sequences_per_epoch=len(trained),
        learning_rate=start.learning_rate,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        probes=[_held_out_probe(measured, length)] if measurable else [],
        label=label,
    )
    return run_job(settings, job)


def _held_out_probe(records: "Sequence[Record]", sequence_length: int) -> "Probe":
    """val_loss over the held-out answers, nats a token."""
    from openpalm.data.loader import RecordLoader
    from openpalm.evaluate.perplexity import split_loss
    from openpalm.train.run import Probe

    rows = len(records)
    loader = RecordLoader(records, rows=rows, seed=0, sequence_length=sequence_length)
    batch = next(loader)  # all of them, once

    return Probe(
        lambda model, dtype: {"val_loss": split_loss(model, [batch], 1, dtype).nats_per_token},
        tell=lambda row: f"held-out answers {row['val_loss']:.4f} nats a token",
    )
