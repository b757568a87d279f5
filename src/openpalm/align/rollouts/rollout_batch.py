"""Answers that the policy gave, as what is learnt from: one answer, a rollout, a batch of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from openpalm.align.pairs.shared_prompt import saves_work, share
from openpalm.data.batches.loader import IGNORE, padded
from openpalm.data.text.conversation import Example
from openpalm.model.layout import Layout, shared_prompt_layout


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine said to a prompt."""

    prompt: int
    """which of the prompts"""
    prompt_ids: Sequence[int]
    ids: list[int]
    """its end marker included, where it came to one"""
    log_probs: list[float]
    """the sampler's, of each token"""
    ended: bool
    """False where it was cut at --max-new-tokens"""


Reward = Callable[[Sequence[Completion]], Sequence[float]]
"""A number for each answer."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Answers as a batch; all [rows, time], position t about the target t, 0 outside of answers.

    Where answers share their prompt's row (align/pairs/shared_prompt.py), inputs and `segments`
    are [prompts, time] and everything else [rows, tokens], with the place in the inputs that
    `reads` names.
    """

    inputs: Tensor
    targets: Tensor
    """int64, IGNORE outside of the answers"""
    old_log_probs: Tensor
    """log-probabilities under the policy that the rollout began with"""
    reference_log_probs: Tensor
    importance_weights: Tensor
    """weight of a token whose sampler was not exactly the policy; 1 where it was"""
    values: Tensor
    advantages: Tensor
    returns: Tensor
    segments: Tensor | None = None
    reads: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE

    @property
    def layout(self) -> Layout | None:
        return None if self.segments is None else shared_prompt_layout(self.segments)

    @property
    def columns(self) -> dict[str, Tensor]:
        """What there is, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if value is not None}

    def take(self, rows: Tensor) -> "RolloutBatch":
        """Some of the rows, as wide as the longest of them."""
        width = int(self.mask[rows].any(dim=0).nonzero().max()) + 1
        return RolloutBatch(**{name: value[rows, :width] for name, value in self.columns.items()})

    def sharing(self, answers: int) -> "RolloutBatch":
        """The same with the answers to each prompt, `answers` rows, in one row if that is less."""
        records = [_record(*row) for row in zip(self.inputs, self.targets, strict=True)]
        groups = [records[i : i + answers] for i in range(0, len(records), answers)]
        if not saves_work(groups):
            return self
        rows = share(groups)
        # Shared rows have the first answer of every prompt first, then every second.
        order = torch.arange(len(records)).view(-1, answers).T.flatten()
        counts, mask = rows.targets != IGNORE, self.mask[order]
        moved = {
            name: torch.zeros(counts.shape).masked_scatter(counts, value[order][mask])
            for name, value in self.columns.items()
            if value.is_floating_point()
        }
        return RolloutBatch(
            rows.inputs, rows.targets, **moved, segments=rows.segments, reads=rows.reads
        )

    def to(self, device: torch.device | str) -> "RolloutBatch":
        return RolloutBatch(**{name: value.to(device) for name, value in self.columns.items()})


@dataclass(frozen=True, slots=True)
class Rollout:
    """What advantages are made of: as RolloutBatch, and a reward for each row."""

    inputs: Tensor
    targets: Tensor
    old_log_probs: Tensor
    reference_log_probs: Tensor
    importance_weights: Tensor
    values: Tensor
    rewards: Tensor
    """[rows], prompt by prompt"""

    @property
    def mask(self) -> Tensor:
        return self.targets != IGNORE


class Estimated(NamedTuple):
    """[rows, time] each."""

    advantages: Tensor
    returns: Tensor


def collate_completions(answers: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [answers, time]; the targets are the answers' tokens alone."""
    rows = [record_of(answer) for answer in answers]
    return padded(rows, max(len(row.ids) for row in rows) - 1)


def record_of(answer: Completion) -> Example:
    """The prompt and its answer, whose tokens alone count."""
    ids = [*answer.prompt_ids, *answer.ids]
    return Example(ids, [False] * len(answer.prompt_ids) + [True] * len(answer.ids))


def _record(inputs: Tensor, targets: Tensor) -> Example:
    """What a row [time] of a batch was made of."""
    places = (targets != IGNORE).nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1])
    ids = [*inputs[: last + 1].tolist(), int(targets[last])]
    return Example(ids, [False] * (first + 1) + [True] * (last - first + 1))
