"""`openpalm reward`: a checkpoint and judgements of answers in, a model that scores answers out."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpalm.align.config import RewardSettings
from openpalm.base.settings import parse

if TYPE_CHECKING:
    from openpalm.align.pairs.reward import Judged, ScoreBatch
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome


def run(argv: Sequence[str]) -> None:
    settings = parse(
        RewardSettings,
        argv,
        verb="reward",
        about="Trains a reward model. From pairs (bradley-terry): the files of `openpalm dpo`. "
        'From ratings (the other losses): a .jsonl of {"prompt": ..., "response": ..., "rating": '
        "...} or of preference records.",
        examples=[
            "openpalm reward --init runs/chat --data pairs.jsonl --out runs/reward --epochs 1",
            "openpalm reward --init runs/chat --data ratings.jsonl --out runs/r --epochs 1 "
            "--loss ordinal",
        ],
    )
    from openpalm.cli.train import report

    report(judge(settings), settings)


def judge(settings: RewardSettings, label: str = "reward") -> "Outcome":
    """Composes the run: weights and heads, judgements, THE loop."""
    from openpalm.align.pairs.pairs import PairLoader
    from openpalm.align.pairs.reward import RewardObjective, collate, fill, head_for
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.model.reward import RewardModel
    from openpalm.train.run import run_training
    from openpalm.train.spec import TrainSpec

    directory, tokenizer, start = fine_tuning_start(settings, may_score=True)
    length = settings.sequence_length or start.config.context
    read = _pairs if settings.reads_pairs else _ratings
    judged, ties = read(settings, tokenizer, length, label)
    ratings = [] if settings.reads_pairs else [record.label for record in judged]
    head = head_for(settings, ratings, start.reward)
    trained, measured = held_out(judged)
    sides = len(judged[0].sides)
    spec = TrainSpec(
        config=start.config,
        make_model=lambda config: RewardModel(config, head),
        fill=lambda model: fill(model, settings, start, ratings),
        make_loader=lambda shape, *_: PairLoader(
            trained, rows=max(1, shape.rows // sides), seed=settings.seed, collate=collate
        ),
        sequences_per_epoch=sides * len(trained),
        learning_rate=start.learning_rate,
        objective=RewardObjective(settings),
        items_per_step=lambda shape: max(1, shape.rows // sides) * shape.accumulation,
        unit="pairs" if settings.reads_pairs else "ratings",
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        probes=[_held_out_probe(settings, measured, ties)] if measured else [],
        label=label,
    )
    return run_training(settings, spec)


def _pairs(
    settings: RewardSettings, tokenizer: "Tokenizer", length: int, label: str
) -> "tuple[Sequence[Judged], Sequence[Judged]]":
    """The pairs, and the held-out ties."""
    from openpalm.align.pairs.pairs import records
    from openpalm.cli.common import held_out, report_unused
    from openpalm.data.rows.pair_files import read_pairs, read_ties
    from openpalm.data.rows.preferences import Pair, Usable

    found = records(tokenizer, read_pairs(settings.data), length - 1)
    pairs = report_unused(label, settings.data, found, "pair").items
    ties = held_out([Pair(*tie) for tie in read_ties(settings.data)])[1]
    return pairs, records(tokenizer, Usable(list(ties), {}), length - 1).items


def _ratings(
    settings: RewardSettings, tokenizer: "Tokenizer", length: int, label: str
) -> "tuple[Sequence[Judged], Sequence[Judged]]":
    """The ratings; no ties."""
    from openpalm.align.pairs.reward import rating_records
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.rating_files import read_ratings

    found = rating_records(tokenizer, read_ratings(settings.data, settings.axis), length)
    return report_unused(label, settings.data, found, "rating").items, []


def _held_out_probe(
    settings: RewardSettings, measured: "Sequence[Judged]", ties: "Sequence[Judged]"
) -> "Probe":
    """Loss on held-out judgements, and how well the rewards agree with them."""
    import torch

    from openpalm.align.pairs.reward import RewardObjective, collate
    from openpalm.evaluate import agreement
    from openpalm.model.reward import RewardModel
    from openpalm.model.transformer import Transformer
    from openpalm.train.probes import Probe

    objective, batch = RewardObjective(settings), collate(measured)
    tied = collate(ties) if ties else None

    def rewards(model: RewardModel, batch: "ScoreBatch") -> torch.Tensor:
        batch = batch.to(model.embedding.device)
        return model.value(batch.ids, batch.mask, batch.prompt_lengths).cpu()

    def differences(model: RewardModel, batch: "ScoreBatch") -> list[float]:
        chosen, rejected = rewards(model, batch).chunk(2)
        return (chosen - rejected).tolist()

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, float]:
        assert isinstance(model, RewardModel)
        device = model.embedding.device
        with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
            loss, metrics = objective.loss(model, batch.to(device))
            values = {"loss": loss.item(), **metrics}
            row = {f"val_{name}": value / len(measured) for name, value in values.items()}
            if not settings.reads_pairs:
                found = rewards(model, batch).tolist()
                return row | {"val_spearman": agreement.spearman(found, batch.labels.tolist())}
            apart = differences(model, batch)
            row["val_calibration_error"] = agreement.calibration_error(apart)
            close = differences(model, tied) if tied else []
            return row | {"val_agreement": agreement.agreement(apart, close)}

    def describe(row: dict[str, float]) -> str:
        said = f"held-out {'pairs' if settings.reads_pairs else 'ratings'}: "
        names = ["loss", "accuracy", "calibration_error", "agreement", "squared_error", "spearman"]
        figures = [n for n in names if f"val_{n}" in row]
        return said + ", ".join(f"{n.replace('_', ' ')} {row[f'val_{n}']:.3f}" for n in figures)

    return Probe(measure, describe=describe)
