"""Rollouts whose every expectation is a sum: the enumerable task's, and settings for them."""

import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import enumerable
import pytest
import torch
from enumerable import ANSWERS, CONFIG, END, LONGEST, PROMPTS
from torch import Tensor

from openpalm.align.config import GrpoSettings, PpoSettings
from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import ppo as ppo_file
from openpalm.align.rollouts.rollout import RolloutLoader
from openpalm.align.rollouts.rollout_batch import (
    Completion,
    Rollout,
    RolloutBatch,
    collate_completions,
)
from openpalm.align.rollouts.sampler import Sampler
from openpalm.model.critic import ActorCritic, Bins, CriticKind
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

_GIVEN: dict[str, Any] = {
    "data": Path("-"),
    "out": Path("-"),
    "init": "-",
    "steps": 9,
    "max_new_tokens": LONGEST,
    "prompts_per_rollout": 4,
    "epochs_per_rollout": 2,
}


EVERY = {"prompts_per_rollout": 1, "num_completions": 341}
"""Settings of a rollout with every completion of one prompt."""


def fails(check, *given: Any) -> None:
    """Asserts that a check refuses what it is given."""
    with pytest.raises(AssertionError):
        check(*given)


def grpo(**changes: Any) -> GrpoSettings:
    return GrpoSettings(**_GIVEN | {"num_completions": 4} | changes)


def ppo(**changes: Any) -> PpoSettings:
    return PpoSettings(**_GIVEN | {"num_completions": 2} | changes)


@cache
@torch.enable_grad()
def task() -> enumerable.Task:
    return enumerable.make(0)


def moved(seed: int = 0, size: float = 0.1) -> Transformer:
    """The task's reference after it went somewhere: a policy."""
    model = copy.deepcopy(task().reference).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def actor(kind: CriticKind = "shared", bins: Bins | None = None, **changes: Any) -> ActorCritic:
    """The policy of `moved`, with a critic whose values are not zero."""
    model = ActorCritic(replace(CONFIG, **changes), kind, bins)
    initialise(model, 3)
    model.load_state_dict(moved().state_dict(), strict=False)
    return model


def every_completion(prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all 341 completions to a prompt of the task."""
    return collate_completions([Completion(prompt, PROMPTS[prompt], a, [], True) for a in ANSWERS])


@torch.no_grad()
def enumerated(model: Transformer, rewards: Tensor | None = None) -> Rollout:
    """All 341 completions to the first prompt, as a rollout of the model."""
    inputs, targets = every_completion()
    old = token_log_probs(model, inputs, targets)
    return Rollout(
        inputs,
        targets,
        old,
        token_log_probs(task().reference, inputs, targets),
        torch.ones_like(old),
        torch.zeros_like(old),
        torch.zeros(len(ANSWERS)) if rewards is None else rewards,
    )


def ragged(rows: int = 6, vocab: int = 5, seed: int = 0, num_completions: int = 1) -> Rollout:
    """Completions of 1, 2, 3 ... tokens to prompts of several lengths, all numbers drawn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> list[int]:
        return torch.randint(vocab, (size,), generator=generator).tolist()

    made = [
        Completion(i, draw(2 + i // num_completions % 2), draw(1 + i % 4), [], True)
        for i in range(rows)
    ]
    inputs, targets = collate_completions(made)
    mask = targets >= 0

    def numbers() -> Tensor:
        return torch.randn(inputs.shape, generator=generator) * mask

    return Rollout(
        inputs,
        targets,
        old_log_probs=numbers() - 2 * mask,
        reference_log_probs=numbers() - 2 * mask,
        importance_weights=torch.where(
            mask, 0.5 + torch.rand(mask.shape, generator=generator), 1.0
        ),
        values=numbers(),
        rewards=torch.randn(rows, generator=generator),
    )


def gradient(model: Transformer, loss: Tensor) -> Tensor:
    """Of the loss, all parameters in one vector; zero where it does not reach."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = zip(model.parameters(), found, strict=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().double() for p, g in pairs]
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Of two gradients, as a share of the wanted one's length."""
    return ((found - wanted).norm() / wanted.norm()).item()


def loader_of(
    model: Transformer,
    settings: Any,
    estimate: Any,
    reward: Any = None,
    *,
    rows: int = 4,
    **more: Any,
) -> RolloutLoader:
    """Rollouts of the task, by the engine."""
    sampler = Sampler(model, PROMPTS, frozenset({END}), settings)
    reference = partial(_reference, settings.temperature)
    return RolloutLoader(sampler, reward or task().reward, estimate, reference, rows=rows, **more)


def _reference(temperature: float, inputs: Tensor, targets: Tensor) -> Tensor:
    return evaluate(task().reference, inputs, targets, temperature=temperature).log_probs


KINDS: dict[str, Any] = {
    "grpo": (grpo, group_file.GroupObjective, group_file.estimate, moved),
    "ppo": (ppo, ppo_file.PpoObjective, ppo_file.estimate, actor),
}
"""Settings, objective, estimate and model of each verb."""


def trainer_of(loader: RolloutLoader, objective: Any, lr: float = 1e-3) -> Trainer:
    model = loader.sampler.model
    return Trainer(model, objective, Optimizer(model, OptimSettings(), lr), loader, steps=99)


def same(a: RolloutBatch, b: RolloutBatch) -> bool:
    """Bit for bit."""
    same = a.columns.keys() == b.columns.keys()
    return same and all(torch.equal(a.columns[name], b.columns[name]) for name in a.columns)
