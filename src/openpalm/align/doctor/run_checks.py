"""The examination before a preference or RL run, on the user's own model, data and rewards.

`run_checks` measures what align/doctor/checks.py judges, in an order in which each check may rely
on those before it: with the run's own template, sampler, log-probabilities, rewards and step.
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
    check_alone,
    check_different,
    check_dropout,
    check_end,
    check_ended,
    check_finite,
    check_kept,
    check_masked,
    check_optimizer,
    check_order,
    check_pair_loss,
    check_place,
    check_prefix,
    check_ratio,
    check_reference,
    check_sampler,
    check_varying,
)
from openpalm.align.logprobs import evaluate
from openpalm.align.pairs.dpo import PairObjective
from openpalm.align.pairs.examples import PreferenceExample, collate, with_reference
from openpalm.align.rollouts.advantages import token_rewards
from openpalm.align.rollouts.grpo import GroupObjective, estimate
from openpalm.align.rollouts.rollout import RolloutLoader, Sampler, reference_log_probs
from openpalm.align.rollouts.rollout_batch import Completion, Reward, collate_completions
from openpalm.data.batches.loader import IGNORE
from openpalm.data.rows.preferences import Messages
from openpalm.data.text.conversation import Example, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Objective
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer


@dataclass(frozen=True)
class PlannedRun:
    """A run that is about to begin, and what it would read."""

    settings: GrpoSettings
    model: Transformer
    """as the run begins with it, adapter attached"""
    optimizer: Optimizer
    reference: Transformer
    tokenizer: Tokenizer
    prompts: Sequence[Sequence[int]]
    """ids, up to where an answer begins; the reward knows them by their number"""
    conversations: Sequence[tuple[Messages, Messages]]
    """prompts with answers, as they are trained on"""
    pairs: Sequence[PreferenceExample]
    """the reward knows theirs by the numbers that follow"""
    stop_ids: frozenset[int]
    reward: Reward | None


def run_checks(patient: PlannedRun) -> Iterator[Check]:
    """One check after the other; what the later ones need is measured when they are asked for."""
    examples = [
        PromptedExample(
            render(patient.tokenizer, prompt, add_generation_prompt=True).ids,
            render(patient.tokenizer, [*prompt, *answer]),
        )
        for prompt, answer in patient.conversations
    ]
    examples = [_last_turn(example) for example in examples]
    yield check_prefix(examples)
    yield check_end(examples, patient.stop_ids)
    yield check_optimizer(patient.model, patient.optimizer)
    sampler = Sampler(patient.model, patient.prompts, patient.stop_ids, patient.settings)
    sampler.refresh()
    count = min(patient.settings.prompts_per_rollout, len(patient.prompts))
    answers = sampler.sample(range(count), patient.settings.num_completions)
    yield check_ended(answers)
    yield from _policy_checks(patient, answers)
    if patient.reward is not None:
        yield from _reward_checks(patient, patient.reward, answers)
    if patient.pairs:
        yield from _pair_checks(patient)
    yield from _step_checks(patient, sampler)


def _policy_checks(patient: PlannedRun, answers: Sequence[Completion]) -> Iterator[Check]:
    inputs, targets = _on(patient.model, collate_completions(answers))
    mask = targets != IGNORE
    with torch.no_grad():
        first = evaluate(patient.model, inputs, targets).log_probs
        patient.model.train()  # as a step finds it
        second = evaluate(patient.model, inputs, targets).log_probs
        reference = evaluate(patient.reference, inputs, targets).log_probs
    yield check_dropout(first, second)
    sampled = torch.tensor([value for answer in answers for value in answer.log_probs])
    yield check_sampler(sampled, first[mask].cpu())
    yield check_reference(first, reference, mask)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return -evaluate(patient.model, inputs, targets).log_probs.sum()

    yield check_masked(patient.model, loss_of, inputs, targets)


def _reward_checks(
    patient: PlannedRun, reward: Reward, answers: Sequence[Completion]
) -> Iterator[Check]:
    rewards = [float(value) for value in reward(answers)]
    yield check_finite(rewards)
    yield check_alone(rewards, [float(reward([answer])[0]) for answer in answers])
    yield check_varying(rewards, patient.settings.num_completions)
    mask = collate_completions(answers)[1] != IGNORE
    ones = torch.ones(len(answers))
    yield check_place(token_rewards(ones, mask, torch.zeros(mask.shape)), ones, mask)


def _pair_checks(patient: PlannedRun) -> Iterator[Check]:
    yield check_different(patient.pairs)
    if patient.reward is not None:
        numbered = list(enumerate(patient.pairs, len(patient.prompts)))
        sides = [[_as_answer(n, pair.completions[side]) for n, pair in numbered] for side in (0, 1)]
        chosen, rejected = (list(patient.reward(side)) for side in sides)
        yield check_finite([*chosen, *rejected])._replace(name="rewards of pairs are finite")
        yield check_order(chosen, rejected)
    batch = collate(with_reference(patient.reference, patient.pairs)).to(
        patient.model.embedding.device
    )
    settings = DpoSettings(data=patient.settings.data, out=patient.settings.out, init="", steps=1)
    patient.model.train()  # as a step finds it
    with torch.no_grad():
        loss = PairObjective(settings).loss(patient.model, batch)[0].item()
    yield check_pair_loss(loss / len(batch))


def _step_checks(patient: PlannedRun, sampler: Sampler) -> Iterator[Check]:
    settings = patient.settings
    reference = reference_log_probs(patient.reference, settings.temperature)
    reward = patient.reward or (lambda answers: [0.0] * len(answers))
    rows = settings.prompts_per_rollout * settings.num_completions
    loader = RolloutLoader(sampler, reward, estimate, reference, rows=rows)
    batch = next(loader).to(patient.model.embedding.device)
    with torch.no_grad():
        now = evaluate(
            patient.model,
            batch.inputs,
            batch.targets,
            batch.layout,
            batch.reads,
            temperature=settings.temperature,
        )
    yield check_ratio(batch.old_log_probs, now.log_probs, batch.mask)
    before = digest(patient.reference)
    objective: Objective[Any] = GroupObjective(settings)
    trainer = Trainer(patient.model, objective, patient.optimizer, loader, steps=1)
    loss, count, _ = trainer.forward_backward([batch])
    trainer.optimizer_step(loss, count, 1.0)
    yield check_kept(before, digest(patient.reference))


def digest(model: Transformer) -> str:
    """Of all its weights."""
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        hashed.update(name.encode())
        hashed.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _last_turn(example: PromptedExample) -> PromptedExample:
    """Up to the last token that counts: what a template writes behind an end is no answer."""
    ids, loss_mask = example.whole
    end = len(ids) - loss_mask[::-1].index(True) if any(loss_mask) else len(ids)
    return PromptedExample(example.before, Example(ids[:end], loss_mask[:end]))


def _as_answer(prompt: int, record: Example) -> Completion:
    start = record.loss_mask.index(True)
    ids = record.ids[start:]
    return Completion(prompt, record.ids[:start], ids, [0.0] * len(ids), ended=True)


def _on(model: Transformer, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = (tensor.to(model.embedding.device) for tensor in tensors)
    return inputs, targets
