"""`openpalm dpo`: trains a checkpoint on preferences, with DPO, KTO and related losses."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openpalm.align.config import WITHOUT_REFERENCE, DpoSettings
from openpalm.base.settings import parse
from openpalm.errors import count_of

if TYPE_CHECKING:
    from openpalm.align.pairs.examples import PreferenceBatch, PreferenceExample
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.objective import Objective
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        DpoSettings,
        argv,
        verb="dpo",
        about="Trains a checkpoint on preferences. --data is a .jsonl of pairs, "
        '{"prompt": ..., "chosen": ..., "rejected": ...}, or of preference records. --loss kto '
        'also reads labelled completions, {"prompt": ..., "completion": ..., "label": true or '
        "false}. The reference model is the checkpoint that --init names.",
        examples=[
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/preferred --epochs 1",
            "openpalm dpo --init runs/chat --data pairs.jsonl --out runs/s --epochs 1 --loss simpo",
            "openpalm dpo --init runs/chat --data thumbs.jsonl --out runs/k --epochs 1 --loss kto",
        ],
    )
    from openpalm.cli.train import report

    report(prefer(settings), settings)


def prefer(settings: DpoSettings, label: str = "dpo") -> "Outcome":
    """Composes the run: weights, examples with the reference's log-probabilities, THE loop."""
    from openpalm.align.pairs.examples import preference_loader
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out, join_processes, warn_of_memory
    from openpalm.train.probes import BestBy
    from openpalm.train.run import run_training
    from openpalm.train.spec import TrainSpec

    join_processes(settings)
    directory, tokenizer, start = fine_tuning_start(settings)
    length = settings.sequence_length or start.config.context
    kind = _kind(settings)
    trained, measured = held_out(_examples(settings, directory, tokenizer, length, label))
    spec = TrainSpec(
        config=start.config,
        fill=start.fill,
        make_loader=lambda shape, *_: preference_loader(
            trained,
            rows=max(1, shape.rows // kind.rows),
            seed=settings.seed,
            collate=kind.collate,
            rank=shape.rank,
            world_size=shape.processes,
        ),
        sequences_per_epoch=kind.rows * len(trained),
        learning_rate=start.learning_rate / 10,
        objective=kind.objective,
        items_per_step=None  # kto's reference point is a mean over a microbatch
        if settings.loss == "kto"
        else lambda shape: max(1, shape.rows // kind.rows) * shape.microbatches,
        unit=kind.unit,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent=start.parent,
        parent_hash=start.parent_hash,
        parent_fixed=settings.loss not in WITHOUT_REFERENCE,
        probes=[_held_out_probe(kind, kind.collate(measured))] if measured else [],
        best=BestBy() if measured else None,
        label=label,
    )
    warn_of_memory(settings, spec)
    return run_training(settings, spec)


class _Kind(NamedTuple):
    """What a loss trains on."""

    unit: str
    rows: int
    """rows of an example in --batch-tokens"""
    objective: "Objective[Any]"
    collate: "Callable[[Sequence[PreferenceExample]], PreferenceBatch]"


def _kind(settings: DpoSettings) -> _Kind:
    from openpalm.align.pairs import dpo, examples, kto

    if settings.loss == "kto":
        return _Kind("completions", 1, kto.KtoObjective(settings), examples.collate)
    return _Kind("pairs", 2, dpo.PairObjective(settings), examples.collate_shared)


def _examples(
    settings: DpoSettings, directory: Path, tokenizer: "Tokenizer", length: int, label: str
) -> "Sequence[PreferenceExample]":
    """The file's examples, with the reference's log-probabilities; reports what is left out."""
    from rich.console import Console

    from openpalm.align.pairs.examples import to_examples, with_reference
    from openpalm.align.pairs.kto import with_mismatched
    from openpalm.base.device import pick_device
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
    from openpalm.data.rows.readers.pairs import read_pairs
    from openpalm.parallel.world import world

    # The last of length + 1 tokens is only a target.
    if settings.loss == "kto":
        noun, given = "labelled completion", read_labelled_completions(settings.data)
        found = to_examples(tokenizer, given, length + 1)
    else:
        noun, found = "pair", to_examples(tokenizer, read_pairs(settings.data), length + 1)
    examples = report_unused(label, settings.data, found, noun).items
    if settings.loss == "kto":
        _report_one_sided(examples, label)
        examples = with_mismatched(examples, length)
    if settings.loss in WITHOUT_REFERENCE:
        return examples
    amount = count_of(len(examples), noun)
    console = Console(stderr=True, quiet=not world().is_main)
    with console.status(f"reference {directory}: log-probabilities of {amount}"):
        reference = checkpoint.load(directory, str(pick_device(settings.device)))
        # Each process evaluates a share of the examples; all of them need every result.
        here = world()
        shares = here.gather(with_reference(reference, examples[here.rank :: here.size]))
        return [share[n] for n in range(len(shares[0])) for share in shares if n < len(share)]


def _report_one_sided(examples: "Sequence[PreferenceExample]", label: str) -> None:
    """Warns where all labels are equal: half of the KTO loss is missing then."""
    if len(labels := {example.label for example in examples}) > 1:
        return
    kind, other, effect = (
        ("desirable", "undesirable", "more")
        if labels == {1.0}
        else ("undesirable", "desirable", "less")
    )
    print(
        f"{label}: {count_of(len(examples), 'labelled completion')}, all {kind}; without {other} "
        f"ones kto only makes these completions {effect} likely",
        file=sys.stderr,
    )


def _held_out_probe(kind: _Kind, batch: "PreferenceBatch") -> "Probe":
    """Loss, accuracy and margin on the held-out examples."""
    from openpalm.train.probes import held_out_probe

    return held_out_probe(
        kind.objective,
        [batch],
        lambda row: (
            f"held-out {kind.unit}: loss {row['val_loss']:.4f}, accuracy "
            f"{row['val_accuracy']:.3f}, reward margin {row['val_reward_margin']:.3f}"
        ),
    )
