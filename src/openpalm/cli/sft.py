"""`openpalm sft`: supervised fine-tuning of a checkpoint on conversations."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.align.config import SftSettings
from openpalm.base.settings import parse
from openpalm.errors import count_of

if TYPE_CHECKING:
    from openpalm.data.rows.tasks import Mixture
    from openpalm.data.text.conversation import Example
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome

_PROBE_ROWS = 16


def run(argv: Sequence[str]) -> None:
    settings = parse(
        SftSettings,
        argv,
        verb="sft",
        about="Supervised fine-tuning of a checkpoint on conversations. --data is a .jsonl of "
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, of '
        '{"prompt": ..., "completion": ...}, ShareGPT, Alpaca, questions with answers, or '
        "preference records, recognised by their keys; or a .yaml that mixes several files. The "
        "loss is on the assistant's turns and their end markers.",
        examples=[
            "openpalm sft --init runs/tiny --data questions.jsonl --out runs/chat --epochs 2",
            "openpalm sft --init runs/tiny --data questions.jsonl --out runs/c2 --minutes 5 --pack",
            "openpalm sft --init runs/tiny --data mixture.yaml --out runs/mixed --epochs 1",
        ],
    )
    from openpalm.cli.train import report

    report(finetune(settings), settings)


def finetune(settings: SftSettings, label: str = "sft") -> "Outcome":
    """Composes the run: weights, conversations as examples, THE loop."""
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import (
        fine_tuning_start,
        held_out,
        join_processes,
        task_probes,
        warn_of_memory,
    )
    from openpalm.data.batches.loader import (
        Batch,
        Loader,
        example_loader,
        packed_loader,
        truncated,
    )
    from openpalm.data.batches.order import mixture as mixed_draws
    from openpalm.data.rows.tasks import read_mixture
    from openpalm.train.batch_shape import BatchShape
    from openpalm.train.probes import BestBy
    from openpalm.train.run import run_training
    from openpalm.train.spec import TrainSpec

    join_processes(settings)
    directory, tokenizer, start = fine_tuning_start(settings)
    length = settings.sequence_length or start.config.context
    mixture = read_mixture(settings.data)
    tasks = [held_out(task) for task in _tasks(mixture, tokenizer, settings, length, label)]
    trained = [example for training, _ in tasks for example in training]
    measured = [example for _, measuring in tasks for example in measuring]
    sizes = [len(training) for training, _ in tasks]
    shares = mixture.shares(sizes)
    draws = mixed_draws(sizes, shares, settings.seed) if len(sizes) > 1 else None
    for task, size, share in zip(mixture.tasks, sizes, shares, strict=True) if draws else ():
        print(f"{label}: {task.name}: {share} draws an epoch of {size} examples", file=sys.stderr)
    if cut := truncated([*trained, *measured], length):
        whole = count_of(len(trained) + len(measured), "conversation")
        print(
            f"{label}: {cut} of {whole} cut at {length} tokens; raise --sequence-length to keep "
            "more",
            file=sys.stderr,
        )
    make = packed_loader if settings.pack else example_loader

    def loader(shape: BatchShape) -> Loader[Batch]:
        return make(
            trained,
            rows=shape.rows,
            seed=settings.seed,
            sequence_length=length,
            rank=shape.rank,
            world_size=shape.processes,
            draws=draws,
        )

    measurable = any(any(example.loss_mask[1 : length + 1]) for example in measured)
    spec = TrainSpec(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: loader(shape),
        sequences_per_epoch=loader(BatchShape(length, 1, 1)).rows_per_epoch,
        learning_rate=start.learning_rate,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=mixture.digest(settings.data),
        parent=start.parent,
        parent_hash=start.parent_hash,
        probes=[
            *([_held_out_probe(measured, length)] if measurable else []),
            *task_probes(settings, tokenizer, chat=settings.template == "chat"),
        ],
        best=BestBy() if measurable else None,
        label=label,
    )
    warn_of_memory(settings, spec)
    return run_training(settings, spec)


def _tasks(
    mixture: "Mixture", tokenizer: "Tokenizer", settings: SftSettings, length: int, label: str
) -> "list[list[Example]]":
    """Each task's conversations as examples; reports what is left out."""
    from openpalm.align.sft import to_examples
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.tasks import read_conversations

    examples = []
    for number, task in enumerate(mixture.tasks):
        given = read_conversations(task, settings.seed + number)
        found = to_examples(tokenizer, given, settings.template, length)
        examples.append(report_unused(label, task.name, found, "conversation").items)
    return examples


def _held_out_probe(examples: "Sequence[Example]", sequence_length: int) -> "Probe":
    """val_loss over the held-out completions, in nats per token."""
    from openpalm.data.batches.loader import Batch, padded
    from openpalm.train.objective import NextToken
    from openpalm.train.probes import held_out_probe

    batches = [
        Batch(*padded(examples[first : first + _PROBE_ROWS], sequence_length))
        for first in range(0, len(examples), _PROBE_ROWS)
    ]
    return held_out_probe(
        NextToken(),
        batches,
        lambda row: f"held-out completions: {row['val_loss']:.4f} nats per token",
    )
