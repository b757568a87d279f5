"""The data of RL: a sampled completion, a rollout of many, and batches for the training steps.

A rollout's tensors are [rows, time], a row per completion. Position t is about the target t, which
the input at t predicts; everything is 0 outside of completions.
"""

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
    """Text that the engine generated for a prompt, as token ids."""

    prompt: int
    """number of the prompt"""
    prompt_ids: Sequence[int]
    ids: list[int]
    """the completion's tokens, with the end marker if it has one"""
    log_probs: list[float]
    """of each token, from the engine that sampled it"""
    ended: bool
    """False if it was cut off at --max-new-tokens"""


Reward = Callable[[Sequence[Completion]], Sequence[float]]
"""One number for each completion."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Completions with everything that a loss needs.

    Without `segments` all tensors are [rows, time]. With them, completions of a prompt share a row
    (align/pairs/shared_prompt.py): inputs and `segments` are [prompts, time], everything else is
    [rows, tokens], and `reads` gives the position in the inputs that predicts each target.
    """

    inputs: Tensor
    targets: Tensor
    """int64, IGNORE outside of completions"""
    old_log_probs: Tensor
    """under the policy at the start of the rollout"""
    reference_log_probs: Tensor
    importance_weights: Tensor
    """policy / sampler, where the sampler was less precise than the policy; else 1"""
    values: Tensor
    advantages: Tensor
    returns: Tensor
    segments: Tensor | None = None
    reads: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """True on the completions' tokens."""
        return self.targets != IGNORE

    @property
    def layout(self) -> Layout | None:
        return None if self.segments is None else shared_prompt_layout(self.segments)

    @property
    def columns(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if value is not None}

    def take(self, rows: Tensor) -> "RolloutBatch":
        """The given rows, cut to the longest of them."""
        # Padding is on the right, so nothing after the longest completion is ever read.
        width = int(self.mask[rows].any(dim=0).nonzero().max()) + 1
        return RolloutBatch(**{name: value[rows, :width] for name, value in self.columns.items()})

    def with_shared_prompts(self, num_completions: int) -> "RolloutBatch":
        """The same batch with all completions of a prompt in one row, if that is less work.

        Rows must be ordered by prompt, `num_completions` each.
        """
        examples = [_example(*row) for row in zip(self.inputs, self.targets, strict=True)]
        groups = [
            examples[i : i + num_completions] for i in range(0, len(examples), num_completions)
        ]
        if not saves_work(groups):
            return self
        rows = share(groups)
        # `share` orders targets by number, then prompt: first every prompt's first completion.
        order = torch.arange(len(examples)).view(-1, num_completions).T.flatten()
        # Both layouts hold the same tokens in the same order, so masks pair them up.
        new_mask, mask = rows.targets != IGNORE, self.mask[order]
        # Inputs and targets come from `share`; the other columns are floats, one per token.
        moved = {
            name: torch.zeros(new_mask.shape).masked_scatter(new_mask, value[order][mask])
            for name, value in self.columns.items()
            if value.is_floating_point()
        }
        return RolloutBatch(
            rows.inputs, rows.targets, **moved, segments=rows.segments, reads=rows.reads
        )

    def to(self, device: torch.device | str) -> "RolloutBatch":
        return RolloutBatch(**{name: value.to(device) for name, value in self.columns.items()})


class AdvantageEstimate(NamedTuple):
    """[rows, time] each."""

    advantages: Tensor
    returns: Tensor
    """targets of the critic; zero without one"""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions and rewards, before advantages are estimated; tensors as in RolloutBatch."""

    inputs: Tensor
    targets: Tensor
    old_log_probs: Tensor
    reference_log_probs: Tensor
    importance_weights: Tensor
    values: Tensor
    rewards: Tensor
    """[rows], ordered by prompt"""

    @property
    def mask(self) -> Tensor:
        """True on the completions' tokens."""
        return self.targets != IGNORE

    def with_estimate(self, estimate: AdvantageEstimate) -> RolloutBatch:
        """The batch of the whole rollout."""
        return RolloutBatch(
            self.inputs,
            self.targets,
            self.old_log_probs,
            self.reference_log_probs,
            self.importance_weights,
            self.values,
            *estimate,
        )


def collate_completions(completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, time], padded on the right; only completion tokens are targets."""
    examples = [to_example(completion) for completion in completions]
    # Inputs are one token shorter: the last token is only a target.
    return padded(examples, max(len(example.ids) for example in examples) - 1)


def to_example(completion: Completion) -> Example:
    """Prompt and completion as a training example; its loss mask is on the completion alone."""
    ids = [*completion.prompt_ids, *completion.ids]
    return Example(ids, [False] * len(completion.prompt_ids) + [True] * len(completion.ids))


def _example(inputs: Tensor, targets: Tensor) -> Example:
    """The inverse of `collate_completions` for one row [time]."""
    places = (targets != IGNORE).nonzero()[:, 0]
    # Targets are shifted by one: the completion starts one place after its first target.
    first, last = int(places[0]), int(places[-1])
    # The last target is no input, so it is appended.
    ids = [*inputs[: last + 1].tolist(), int(targets[last])]
    return Example(ids, [False] * (first + 1) + [True] * (last - first + 1))
