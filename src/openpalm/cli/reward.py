"""`openpalm reward`: trains a reward model on pairs or on ratings of completions."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.align.config import RewardSettings
from openpalm.base.settings import parse

if TYPE_CHECKING:
    from openpalm.align.pairs.examples import PreferenceExample
    from openpalm.align.pairs.reward_model import ScoreBatch
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        RewardSettings,
        argv,
        verb="reward",
        about="Trains a reward model. --loss bradley-terry reads pairs, in the files of `openpalm "
        'dpo`. The other losses read ratings: a .jsonl of {"prompt": ..., "response": ..., '
        '"rating": ...} or of preference records.',
        examples=[
            "openpalm reward --init runs/chat --data pairs.jsonl --out runs/reward --epochs 1",
            "openpalm reward --init runs/chat --data ratings.jsonl --out runs/r --epochs 1 "
            "--loss ordinal",
        ],
    )
    from openpalm.cli.train import report

    report(train_reward_model(settings), settings)


def train_reward_model(settings: RewardSettings, label: str = "reward") -> "Outcome":
    """Composes the run: weights and heads, examples, THE loop."""
    from openpalm.align.pairs.examples import preference_loader
    from openpalm.align.pairs.reward_model import (
        RewardObjective,
        choose_head,
        collate,
        load_first_weights,
    )
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out, join_processes, warn_of_memory
    from openpalm.model.reward import RewardModel
    from openpalm.train.probes import BestBy
    from openpalm.train.run import run_training
    from openpalm.train.spec import TrainSpec

    join_processes(settings)
    directory, tokenizer, start = fine_tuning_start(settings, may_score=True)
    length = settings.sequence_length or start.config.context
    read = _pairs if settings.reads_pairs else _ratings
    examples, ties = read(settings, tokenizer, length, label)
    ratings = [] if settings.reads_pairs else [example.label for example in examples]
    head = choose_head(settings, ratings, start.reward)
    trained, measured = held_out(examples)
    rows = len(examples[0].completions)
    spec = TrainSpec(
        config=start.config,
        make_model=lambda config: RewardModel(config, head),
        fill=lambda model: load_first_weights(model, settings, start, ratings),
        make_loader=lambda shape, *_: preference_loader(
            trained,
            rows=max(1, shape.rows // rows),
            seed=settings.seed,
            collate=collate,
            rank=shape.rank,
            world_size=shape.processes,
        ),
        sequences_per_epoch=rows * len(trained),
        learning_rate=start.learning_rate,
        objective=RewardObjective(settings),
        items_per_step=lambda shape: max(1, shape.rows // rows) * shape.microbatches,
        unit="pairs" if settings.reads_pairs else "ratings",
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent=start.parent,
        parent_hash=start.parent_hash,
        probes=[_held_out_probe(settings, measured, ties)] if measured else [],
        best=BestBy() if measured else None,
        label=label,
    )
    warn_of_memory(settings, spec)
    return run_training(settings, spec)


def _pairs(
    settings: RewardSettings, tokenizer: "Tokenizer", length: int, label: str
) -> "tuple[Sequence[PreferenceExample], Sequence[PreferenceExample]]":
    """The pairs, and the held-out ties."""
    from openpalm.align.pairs.examples import to_examples
    from openpalm.cli.common import held_out, report_unused
    from openpalm.data.rows.preferences import Pair
    from openpalm.data.rows.read_result import ReadResult
    from openpalm.data.rows.readers.pairs import read_pairs, read_ties

    found = to_examples(tokenizer, read_pairs(settings.data), length)
    pairs = report_unused(label, settings.data, found, "pair").items
    ties = held_out([Pair(*tie) for tie in read_ties(settings.data)])[1]
    return pairs, to_examples(tokenizer, ReadResult(list(ties), {}), length).items


def _ratings(
    settings: RewardSettings, tokenizer: "Tokenizer", length: int, label: str
) -> "tuple[Sequence[PreferenceExample], Sequence[PreferenceExample]]":
    """The ratings; no ties."""
    from openpalm.align.pairs.examples import to_examples
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.readers.ratings import read_ratings

    found = to_examples(tokenizer, read_ratings(settings.data, settings.axis), length)
    return report_unused(label, settings.data, found, "rating").items, []


def _held_out_probe(
    settings: RewardSettings,
    measured: "Sequence[PreferenceExample]",
    ties: "Sequence[PreferenceExample]",
) -> "Probe":
    """Loss on held-out examples, and how well the rewards agree with their labels."""
    import torch

    from openpalm.align.pairs.reward_model import RewardObjective, collate
    from openpalm.evaluate import agreement
    from openpalm.model.reward import RewardModel
    from openpalm.model.transformer import Transformer
    from openpalm.train.probes import held_out_probe

    batch, tied = collate(measured), collate(ties) if ties else None

    def rewards(model: Transformer, batch: "ScoreBatch") -> torch.Tensor:
        assert isinstance(model, RewardModel)
        batch = batch.to(model.embedding.device)
        return model.value(batch.ids, batch.mask, batch.prompt_lengths).cpu()

    def differences(model: Transformer, batch: "ScoreBatch") -> list[float]:
        chosen, rejected = rewards(model, batch).chunk(2)
        return (chosen - rejected).tolist()

    def agreements(model: Transformer) -> dict[str, float]:
        if not settings.reads_pairs:
            found = rewards(model, batch).tolist()
            return {"val_spearman": agreement.spearman(found, batch.labels.tolist())}
        gaps = differences(model, batch)
        tied_gaps = differences(model, tied) if tied else []
        return {
            "val_calibration_error": agreement.calibration_error(gaps),
            "val_agreement": agreement.agreement(gaps, tied_gaps),
        }

    def describe(row: dict[str, float]) -> str:
        said = f"held-out {'pairs' if settings.reads_pairs else 'ratings'}: "
        names = ["loss", "accuracy", "calibration_error", "agreement", "squared_error", "spearman"]
        figures = [n for n in names if f"val_{n}" in row]
        return said + ", ".join(f"{n.replace('_', ' ')} {row[f'val_{n}']:.3f}" for n in figures)

    return held_out_probe(RewardObjective(settings), [batch], describe, more=agreements)
