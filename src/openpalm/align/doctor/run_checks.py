"""Runs the checks before a preference or RL run on the user's own model, data and reward.

Measures with the code that the run will use: template, sampler, log-probabilities, rewards,
optimizer step. The order matters: each check may rely on the ones before it, so the first failure
names the cause and not a consequence.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openpalm.align.config import DpoSettings, GrpoSettings
from openpalm.align.doctor.checks import (
    Check,
    PromptedExample,
    check_batch_independent,
    check_completions_end,
    check_different,
    check_dropout,
    check_end_marker,
    check_finite,
    check_frozen_reference,
    check_loss_mask,
    check_masked,
    check_optimizer,
    check_order,
    check_pair_loss,
    check_ratio,
    check_reference,
    check_reward_position,
    check_sampler,
    check_varying,
)
from openpalm.align.logprobs import evaluate
from openpalm.align.pairs.dpo import PairObjective
from openpalm.align.pairs.examples import PreferenceExample, collate, with_reference
from openpalm.align.rollouts.advantages import token_rewards
from openpalm.align.rollouts.grpo import GroupObjective, estimate
from openpalm.align.rollouts.rollout import RolloutLoader, reference_log_probs
from openpalm.align.rollouts.rollout_batch import Completion, Reward, collate_completions
from openpalm.align.rollouts.sampler import Sampler
from openpalm.data.batches.loader import IGNORE
from openpalm.data.rows.messages import Messages
from openpalm.data.text.conversation import Example, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Objective
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer


@dataclass(frozen=True)
class PlannedRun:
    """What the run would start with."""

    settings: GrpoSettings
    model: Transformer
    """with the run's first weights and its adapter"""
    optimizer: Optimizer
    reference: Transformer
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    """ids up to the completion; the reward refers to them by number"""
    conversations: Sequence[tuple[Messages, Messages]]
    """prompts with completions"""
    pairs: Sequence[PreferenceExample]
    """their prompts have the numbers after those of `prompts`"""
    stop_ids: frozenset[int]
    reward: Reward | None


def run_checks(planned: PlannedRun) -> Iterator[Check]:
    """The checks one by one; the caller stops at a failure, so each measures only when reached."""
    examples = [
        PromptedExample(
            render(planned.tokenizer, prompt, add_generation_prompt=True).ids,
            render(planned.tokenizer, [*prompt, *completion]),
        )
        for prompt, completion in planned.conversations
    ]
    examples = [_last_turn(example) for example in examples]
    yield check_loss_mask(examples)
    yield check_end_marker(examples, planned.stop_ids)
    yield check_optimizer(planned.model, planned.optimizer)
    sampler = Sampler(planned.model, planned.prompts, planned.stop_ids, planned.settings)
    sampler.refresh()
    count = min(planned.settings.prompts_per_rollout, len(planned.prompts))
    completions = sampler.sample(range(count), planned.settings.num_completions)
    yield check_completions_end(completions)
    yield from _policy_checks(planned, completions)
    if planned.reward is not None:
        yield from _reward_checks(planned, planned.reward, completions)
    if planned.pairs:
        yield from _pair_checks(planned)
    yield from _step_checks(planned, sampler)


def _policy_checks(planned: PlannedRun, completions: Sequence[Completion]) -> Iterator[Check]:
    inputs, targets = _on(planned.model, collate_completions(completions))
    mask = targets != IGNORE
    with torch.no_grad():
        first = evaluate(planned.model, inputs, targets).log_probs
        planned.model.train()  # as the training loop leaves it: dropout must be off anyway
        second = evaluate(planned.model, inputs, targets).log_probs
        reference = evaluate(planned.reference, inputs, targets).log_probs
    yield check_dropout(first, second)
    sampled = torch.tensor(
        [log_prob for completion in completions for log_prob in completion.log_probs]
    )
    yield check_sampler(sampled, first[mask].cpu())
    yield check_reference(first, reference, mask)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return -evaluate(planned.model, inputs, targets).log_probs.sum()

    yield check_masked(planned.model, loss_of, inputs, targets)


def _reward_checks(
    planned: PlannedRun, reward: Reward, completions: Sequence[Completion]
) -> Iterator[Check]:
    rewards = [float(value) for value in reward(completions)]
    yield check_finite(rewards)
    yield check_batch_independent(rewards, [float(reward([each])[0]) for each in completions])
    yield check_varying(rewards, planned.settings.num_completions)
    mask = collate_completions(completions)[1] != IGNORE
    ones = torch.ones(len(completions))
    yield check_reward_position(token_rewards(ones, mask, torch.zeros(mask.shape)), ones, mask)


def _pair_checks(planned: PlannedRun) -> Iterator[Check]:
    yield check_different(planned.pairs)
    if planned.reward is not None:
        numbered = list(enumerate(planned.pairs, len(planned.prompts)))
        sides = [
            [_as_completion(n, pair.completions[side]) for n, pair in numbered] for side in (0, 1)
        ]
        chosen, rejected = (list(planned.reward(side)) for side in sides)
        yield check_finite([*chosen, *rejected])._replace(name="rewards of pairs are finite")
        yield check_order(chosen, rejected)
    batch = collate(with_reference(planned.reference, planned.pairs)).to(
        planned.model.embedding.device
    )
    settings = DpoSettings(data=planned.settings.data, out=planned.settings.out, init="", steps=1)
    planned.model.train()  # as the training loop leaves it: dropout must be off anyway
    with torch.no_grad():
        loss = PairObjective(settings).loss(planned.model, batch)[0].item()
    yield check_pair_loss(loss / len(batch))


def _step_checks(planned: PlannedRun, sampler: Sampler) -> Iterator[Check]:
    settings = planned.settings
    reference = reference_log_probs(planned.reference, settings.temperature)
    reward = planned.reward or (lambda completions: [0.0] * len(completions))
    rows = settings.prompts_per_rollout * settings.num_completions
    loader = RolloutLoader(sampler, reward, estimate, reference, rows=rows)
    batch = next(loader).to(planned.model.embedding.device)
    with torch.no_grad():
        now = evaluate(
            planned.model,
            batch.inputs,
            batch.targets,
            batch.layout,
            batch.reads,
            temperature=settings.temperature,
        )
    yield check_ratio(batch.old_log_probs, now.log_probs, batch.mask)
    before = digest(planned.reference)
    objective: Objective[Any] = GroupObjective(settings)
    trainer = Trainer(planned.model, objective, planned.optimizer, loader, steps=1)
    loss, count, _ = trainer.forward_backward([batch])
    trainer.optimizer_step(loss, count, 1.0)
    yield check_frozen_reference(before, digest(planned.reference))


def digest(model: Transformer) -> str:
    """Hash of all weights."""
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        hashed.update(name.encode())
        hashed.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _last_turn(example: PromptedExample) -> PromptedExample:
    """Cut after the last token under the loss: templates may add white space after an end."""
    ids, loss_mask = example.conversation
    end = len(ids) - loss_mask[::-1].index(True) if any(loss_mask) else len(ids)
    return PromptedExample(example.prompt_ids, Example(ids[:end], loss_mask[:end]))


def _as_completion(prompt: int, record: Example) -> Completion:
    start = record.loss_mask.index(True)
    ids = record.ids[start:]
    return Completion(prompt, record.ids[:start], ids, [0.0] * len(ids), ended=True)


def _on(model: Transformer, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = (tensor.to(model.embedding.device) for tensor in tensors)
    return inputs, targets
