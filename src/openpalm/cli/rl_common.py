"""What ppo and grpo compose alike: prompts, rewards, a reference, and answers looked at."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openpalm.align.config import RolloutSettings, reward_sources, rollout_rate
from openpalm.errors import RewardError, SettingsError

if TYPE_CHECKING:
    from openpalm.align.judging.reward_sources import RewardContext
    from openpalm.align.rollouts.rollout import LogProbs
    from openpalm.align.rollouts.rollout_batch import Reward
    from openpalm.data.rows.prompt_files import PromptRow
    from openpalm.data.rows.read_result import ReadResult
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer
    from openpalm.train.config import BatchShape
    from openpalm.train.objective import Objective
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome

LEAST_LOOKED_AT, MAX_LOOKED_AT = 16, 64
"""Prompts of the evaluations; fewer held-out ones say too little, then some of training's serve."""
SHOWN = 4


def train_on_rollouts(
    settings: RolloutSettings,
    objective: "Objective[Any]",
    estimate: Callable[..., Any],
    label: str,
    make_model: "Callable[[ModelConfig], Transformer] | None" = None,
    prepare: "Callable[[Transformer], None]" = lambda model: None,
) -> "Outcome":
    """Composes the run; `prepare` gets the model after its weights were filled in."""
    import torch

    from openpalm.align.judging.reward_sources import (
        RewardContext,
        RewardPrompt,
        fingerprint,
        load_reward,
        question_of,
    )
    from openpalm.align.rollouts.rollout import RolloutLoader, Sampler
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out
    from openpalm.data.rows.prompt_files import read_prompts
    from openpalm.data.text.conversation import stop_ids
    from openpalm.model.transformer import Transformer
    from openpalm.train.config import BatchShape
    from openpalm.train.run import run_training
    from openpalm.train.run_directory import reward_failed
    from openpalm.train.spec import TrainSpec

    if not reward_sources(settings.reward):
        raise SettingsError("--reward: what is an answer worth? give FILE.py:FUNCTION or a run")
    directory, tokenizer, start = fine_tuning_start(settings)
    given = read_prompts(settings.data)
    asked, ids = usable_prompts(given, tokenizer, settings, start.config.context, label)
    reader = RewardContext(
        tokenizer,
        [RewardPrompt(question_of(row.prompt), row.row) for row in asked],
        stop_ids(tokenizer),
    )
    reward = load_reward(reward_sources(settings.reward), reader)
    gold = (
        load_reward(reward_sources(settings.gold_reward), reader, "gold_reward")
        if settings.gold_reward
        else None
    )
    numbers = range(len(ids))
    trained, measured = held_out(numbers)
    enough = len(measured) >= LEAST_LOOKED_AT
    looked_at = list(measured if enough else numbers)[:MAX_LOOKED_AT]
    reference = _reference(directory, settings)
    shape = _shape(settings, max(map(len, ids)) + settings.max_new_tokens)

    def fill(model: Transformer) -> None:
        start.fill(model)
        prepare(model)

    def make_loader(shape: BatchShape, model: Transformer, dtype: torch.dtype) -> RolloutLoader:
        sampler = Sampler(model, ids[: len(trained)], reader.stop_ids, settings)
        held = reference(model) if settings.kl_coef else None
        return RolloutLoader(sampler, reward, estimate, held, rows=shape.rows, dtype=dtype)

    spec = TrainSpec(
        config=start.config,
        fill=fill,
        make_loader=make_loader,
        sequences_per_epoch=len(trained) * settings.num_completions * settings.epochs_per_rollout,
        learning_rate=rollout_rate(start.learning_rate),
        objective=objective,
        unit="completions",
        make_model=make_model or Transformer,
        shape=shape,
        tokenizer_json=checkpoint.tokenizer_json(directory),
        data_hash=hashlib.sha256(settings.data.read_bytes()).hexdigest(),
        parent_hash=start.parent_hash,
        reward_hash=fingerprint(
            [*reward_sources(settings.reward), *reward_sources(settings.gold_reward)]
        ),
        parent_fixed=True,
        probes=_probes(settings, reader, ids, looked_at, reference, reward, gold),
        best="val_gold" if gold else "val_reward",
        label=label,
    )
    try:
        return run_training(settings, spec)
    except RewardError:
        reward_failed(settings.out)
        raise


class AsksSettings(Protocol):
    """What a verb says about the answers that it has the model write."""

    @property
    def data(self) -> Path: ...

    @property
    def max_new_tokens(self) -> int: ...


def usable_prompts(
    given: "ReadResult[PromptRow]",
    tokenizer: "Tokenizer",
    settings: AsksSettings,
    context: int,
    label: str,
) -> "tuple[list[PromptRow], list[list[int]]]":
    """The prompts that leave room for an answer in `context` tokens, and their ids.

    Reports what is left out. Raises DataError where nothing is left.
    """
    from openpalm.cli.common import report_unused
    from openpalm.data.text.conversation import render

    room = context - settings.max_new_tokens

    def made(row: "PromptRow") -> "tuple[PromptRow, list[int]] | str":
        ids = render(tokenizer, row.prompt, add_generation_prompt=True).ids
        if len(ids) > room:
            return f"longer than {room} tokens, which --max-new-tokens leaves of {context}"
        return row, ids

    kept = report_unused(label, settings.data, given.map(made), "prompt").items
    return [row for row, _ in kept], [ids for _, ids in kept]


def _reference(directory: Path, settings: RolloutSettings) -> "Callable[[Transformer], LogProbs]":
    """What the checkpoint that the run began from thinks of answers, at the run's temperature.

    Of a policy with an adapter that is the policy with the adapter off; else a copy is kept.
    """
    from openpalm.align.rollouts.rollout import reference_log_probs
    from openpalm.base.device import pick_device
    from openpalm.checkpoint import directory as checkpoint

    device = str(pick_device(settings.device))
    copy = None if settings.lora.rank else checkpoint.load(directory, device)

    def of(policy: "Transformer") -> "LogProbs":
        model, below = (policy, True) if copy is None else (copy, False)
        return reference_log_probs(model, settings.temperature, below_adapter=below)

    return of


def _shape(settings: RolloutSettings, longest: int) -> "BatchShape":
    """How a rollout's answers are cut into steps and microbatches."""
    from openpalm.train.config import BatchShape

    step = settings.prompts_per_rollout * settings.num_completions // settings.minibatches
    room = max(1, settings.microbatch_tokens // longest)
    rows = max(r for r in range(1, min(room, step) + 1) if step % r == 0)
    return BatchShape(longest, rows, step // rows)


def _probes(
    settings: RolloutSettings,
    reader: "RewardContext",
    ids: "list[list[int]]",
    looked_at: list[int],
    reference: "Callable[[Transformer], LogProbs]",
    reward: "Reward",
    gold: "Reward | None",
) -> "list[Probe]":
    """Figures of the held-out answers, with the alarm; and some of the answers."""
    from openpalm.align.rollouts.monitor import evaluate_policy, stop_reason
    from openpalm.align.rollouts.rollout import Sampler
    from openpalm.train.probes import Probe

    shown: list[dict[str, str]] = []

    def figures(model: "Transformer", dtype: object) -> dict[str, Any]:
        sampler = Sampler(model, ids, reader.stop_ids, settings)
        row, answers = evaluate_policy(sampler, looked_at, reference(model), reward, gold)
        shown[:] = [
            {"prompt": f"{reader.asked[answer.prompt].question}\n", "text": reader.text(answer)}
            for answer in answers[:SHOWN]
        ]
        return row

    def describe(row: dict[str, Any]) -> str:
        gold_told = f", gold {row['val_gold']:.3f}" if "val_gold" in row else ""
        return (
            f"held-out answers: reward {row['val_reward']:.3f}{gold_told}, "
            f"{row['val_kl']:.2f} nats from the reference, {row['val_length']:.0f} tokens"
        )

    return [
        Probe(
            figures,
            describe=describe,
            alarm=lambda rows: stop_reason(settings.early_stopping, rows),
        ),
        Probe(lambda *_: {"samples": list(shown)}, file="samples.jsonl"),
    ]
