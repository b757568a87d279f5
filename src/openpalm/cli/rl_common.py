"""Shared by ppo and grpo: prompts, rewards, reference policy, evaluations on held-out prompts.

best-of-n, judge and doctor read their prompts with `usable_prompts` too.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openpalm.align.config import RolloutSettings, reward_sources, rollout_rate
from openpalm.errors import RewardError, SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.align.judging.reward_sources import RewardContext
    from openpalm.align.rollouts.rollout import LogProbs
    from openpalm.align.rollouts.rollout_batch import Reward
    from openpalm.data.rows.read_result import ReadResult
    from openpalm.data.rows.readers.prompts import PromptRow
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer
    from openpalm.train.batch_shape import BatchShape
    from openpalm.train.objective import Objective
    from openpalm.train.probes import Probe
    from openpalm.train.run import Outcome
    from openpalm.train.spec import TrainSpec

MIN_EVAL_PROMPTS, MAX_EVAL_PROMPTS = 16, 64
"""Prompts of an evaluation. With fewer held-out prompts training prompts are evaluated too."""
SAMPLES = 4
"""Completions that an evaluation writes to samples.jsonl."""


def train_on_rollouts(
    settings: RolloutSettings,
    objective: "Objective[Any]",
    estimate: Callable[..., Any],
    label: str,
    make_model: "Callable[[ModelConfig], Transformer] | None" = None,
    prepare: "Callable[[Transformer], None]" = lambda model: None,
) -> "Outcome":
    """Composes the run; `prepare` is called with the model once its weights are loaded."""
    import torch

    from openpalm.align.judging.reward_sources import RewardContext, fingerprint, load_reward
    from openpalm.align.rollouts.rollout import RolloutLoader
    from openpalm.align.rollouts.sampler import Sampler
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.cli.common import fine_tuning_start, held_out, join_processes
    from openpalm.data.rows.readers.prompts import read_prompts
    from openpalm.model.transformer import Transformer
    from openpalm.parallel.world import world
    from openpalm.train.batch_shape import BatchShape
    from openpalm.train.probes import BestBy
    from openpalm.train.spec import TrainSpec

    if not reward_sources(settings.reward):
        raise SettingsError("--reward: missing; give FILE.py:FUNCTION or a reward model's run")
    join_processes(settings)
    directory, tokenizer, start = fine_tuning_start(settings)
    prompts, ids = usable_prompts(
        read_prompts(settings.data), tokenizer, settings, start.config.context, label
    )
    context = RewardContext.from_rows(tokenizer, prompts)
    reward = load_reward(reward_sources(settings.reward), context)
    gold_sources = reward_sources(settings.gold_reward)
    gold = load_reward(gold_sources, context, "gold_reward") if gold_sources else None
    trained, measured = held_out(range(len(ids)))
    enough = len(measured) >= MIN_EVAL_PROMPTS
    evaluated = list(measured if enough else range(len(ids)))[:MAX_EVAL_PROMPTS]
    reference = _reference(directory, settings)
    unsharded = _unsharded(settings, make_model or Transformer, start.config)
    shape = _shape(settings, max(map(len, ids)) + settings.max_new_tokens, world().data_size)

    def fill(model: Transformer) -> None:
        start.fill(model)
        prepare(model)

    def make_loader(shape: BatchShape, model: Transformer, dtype: torch.dtype) -> RolloutLoader:
        plain = unsharded()
        sampler = Sampler(model, ids[: len(trained)], context.stop_ids, settings, plain=plain)
        # Without a penalty nothing reads the reference, so its forward pass is saved.
        penalised_by = reference(model) if settings.kl_coef else None
        return RolloutLoader(
            *(sampler, reward, estimate, penalised_by),
            rows=shape.rows,
            dtype=dtype,
            world=world(),
        )

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
        parent=start.parent,
        parent_hash=start.parent_hash,
        reward_hash=fingerprint([*reward_sources(settings.reward), *gold_sources]),
        parent_fixed=True,
        probes=_probes(settings, context, ids, evaluated, reference, reward, gold, unsharded),
        best=BestBy("val_gold" if gold else "val_reward", highest=True, always=True),
        label=label,
    )
    return _run(settings, spec)


def _run(settings: RolloutSettings, spec: "TrainSpec") -> "Outcome":
    """Trains; notes in the run directory if a reward ended it."""
    from openpalm.cli.common import warn_of_memory
    from openpalm.train.run import run_training
    from openpalm.train.run_directory import reward_failed

    # The reference is a second model, except with LoRA.
    warn_of_memory(settings, spec, frozen_copies=not settings.lora.rank)
    try:
        return run_training(settings, spec)
    except RewardError:
        reward_failed(settings.out)
        raise


class PromptSettings(Protocol):
    """The settings of a verb that samples completions of prompts."""

    @property
    def data(self) -> Path: ...

    @property
    def max_new_tokens(self) -> int: ...


def usable_prompts(
    given: "ReadResult[PromptRow]",
    tokenizer: "Tokenizer",
    settings: PromptSettings,
    context: int,
    label: str,
) -> "tuple[list[PromptRow], list[list[int]]]":
    """The prompts that leave room for a completion in `context` tokens, and their ids.

    Reports the others. Raises DataError if none is left.
    """
    from openpalm.cli.common import report_unused
    from openpalm.data.text.conversation import render

    room = context - settings.max_new_tokens

    def render_prompt(row: "PromptRow") -> "tuple[PromptRow, list[int]] | str":
        ids = render(tokenizer, row.prompt, add_generation_prompt=True).ids
        if len(ids) > room:
            return f"longer than {room} tokens, which --max-new-tokens leaves of {context}"
        return row, ids

    kept = report_unused(label, settings.data, given.map(render_prompt), "prompt").items
    return [row for row, _ in kept], [ids for _, ids in kept]


def _reference(directory: Path, settings: RolloutSettings) -> "Callable[[Transformer], LogProbs]":
    """Makes the reference policy: the run's initial checkpoint, at the run's temperature.

    With LoRA it is the policy with its adapter switched off; otherwise a second copy of the model.
    """
    from openpalm.align.rollouts.rollout import reference_log_probs
    from openpalm.base.device import pick_device

    device = str(pick_device(settings.device))
    copy = None if settings.lora.rank else _frozen(directory, device)

    def reference_of(policy: "Transformer") -> "LogProbs":
        model, below = (policy, True) if copy is None else (copy, False)
        return reference_log_probs(model, settings.temperature, below_adapter=below)

    return reference_of


def _unsharded(
    settings: RolloutSettings,
    make_model: "Callable[[ModelConfig], Transformer]",
    config: "ModelConfig",
) -> "Callable[[], Transformer | None]":
    """Makes, once, the model into which sharded weights are gathered to generate text.

    For one process it gives None.
    """
    from openpalm.base.device import pick_device
    from openpalm.parallel.world import world
    from openpalm.train.initial_weights import unfilled

    @cache
    def make() -> "Transformer | None":
        if world().size == 1:
            return None
        device = pick_device(settings.device)
        return unfilled(lambda: make_model(config), settings).to_empty(device=device).eval()

    return make


def _frozen(directory: Path, device: str) -> "Transformer":
    """The checkpoint's model for evaluation, sharded over the run's processes."""
    import torch

    from openpalm.checkpoint import directory as checkpoint
    from openpalm.model.transformer import Transformer
    from openpalm.parallel import fsdp
    from openpalm.parallel.world import world

    if world().size == 1:
        return checkpoint.load(directory, device)
    with torch.device("meta"):
        model = Transformer(checkpoint.load_config(directory))
    model.requires_grad_(False)
    fsdp.shard(model, world(), torch.float32, reshard=True)
    model.to_empty(device=device)
    checkpoint.load_merged(model, directory)
    return model.eval()


def _shape(settings: RolloutSettings, longest: int, processes: int) -> "BatchShape":
    """Completions per microbatch and microbatches per step, of each process."""
    from openpalm.train.batch_shape import BatchShape

    step = settings.prompts_per_rollout * settings.num_completions // settings.minibatches
    if step % processes:
        raise SettingsError(
            f"--prompts-per-rollout {settings.prompts_per_rollout}: makes steps of "
            f"{count_of(step, 'completion')}, which {processes} processes cannot share equally; "
            "take a multiple"
        )
    step //= processes
    room = max(1, settings.microbatch_tokens // longest)
    # The largest divisor of a step that fits, so that all microbatches are full.
    rows = max(r for r in range(1, min(room, step) + 1) if step % r == 0)
    return BatchShape(longest, rows, step // rows, processes=processes)


def _probes(
    settings: RolloutSettings,
    context: "RewardContext",
    ids: "list[list[int]]",
    evaluated: list[int],
    reference: "Callable[[Transformer], LogProbs]",
    reward: "Reward",
    gold: "Reward | None",
    unsharded: "Callable[[], Transformer | None]",
) -> "list[Probe]":
    """Evaluations on held-out prompts, with early stopping, and samples of the completions.

    All processes sample and evaluate the same completions; the main one asks the rewards.
    """
    from openpalm.align.rollouts.monitor import evaluate_policy, stop_reason
    from openpalm.align.rollouts.sampler import Sampler
    from openpalm.parallel.world import world
    from openpalm.train.probes import Probe

    samples: list[dict[str, str]] = []

    def measure(model: "Transformer", dtype: object) -> dict[str, Any]:
        sampler = Sampler(model, ids, context.stop_ids, settings, plain=unsharded())
        row, completions = evaluate_policy(
            sampler, evaluated, reference(model), on_main(reward), on_main(gold) if gold else None
        )
        samples[:] = [
            {"prompt": f"{context.prompts[c.prompt].question}\n", "text": context.text(c)}
            for c in completions[:SAMPLES]
        ]
        return row

    def on_main(asked: "Reward") -> "Reward":
        return lambda completions: world().on_main(lambda: asked(completions))

    def describe(row: dict[str, Any]) -> str:
        gold_reward = f", gold reward {row['val_gold']:.3f}" if "val_gold" in row else ""
        return (
            f"held-out prompts: reward {row['val_reward']:.3f}{gold_reward}, "
            f"{row['val_kl']:.2f} nats from the reference, {row['val_length']:.0f} tokens"
        )

    return [
        Probe(
            measure,
            describe=describe,
            alarm=lambda rows: stop_reason(settings.early_stopping, rows),
        ),
        Probe(lambda *_: {"samples": list(samples)}, file="samples.jsonl"),
    ]
