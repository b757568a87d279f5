"""Checks before a preference or RL run, one for each silent bug known from RLHF implementations.

These bugs raise no error: the run trains, but not what was intended. Each check is a pure function
of measured values (run_checks.py measures them) and returns its name, what it found and should
find, and the remedy.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openpalm.align.pairs.examples import PreferenceExample
from openpalm.align.rollouts.advantages import zero_variance
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.data.batches.loader import IGNORE
from openpalm.data.text.conversation import Example
from openpalm.model import lora
from openpalm.model.transformer import Transformer
from openpalm.train.optimization.parameter_groups import Optimizer

TOLERANCE = 1e-5
"""Largest difference of float32 log-probabilities, relative to the largest one if above 1 nat."""


class Check(NamedTuple):
    """The result of a check; `found` and `remedy` are sentences for the user."""

    name: str
    ok: bool
    found: str
    remedy: str


class PromptedExample(NamedTuple):
    """A prompt as generation renders it, and the conversation with completion as training does."""

    prompt_ids: list[int]
    conversation: Example


# The data.


def check_loss_mask(examples: Sequence[PromptedExample]) -> Check:
    """The prompt has the same ids in generation and training, and the loss begins right after."""
    wrong = sum(
        whole.ids[: len(prompt)] != prompt
        or whole.loss_mask[len(prompt) - 1 : len(prompt) + 1] != [False, True]
        for prompt, whole in examples
    )
    return Check(
        "loss mask starts at the completion",
        wrong == 0,
        f"in {wrong} of {len(examples)} examples the loss does not start where the prompt ends; "
        "should be 0",
        "the prompt's ids must be a prefix of the conversation's ids: render both with "
        "openpalm.data.text.conversation and with the checkpoint's own tokenizer",
    )


def check_end_marker(examples: Sequence[PromptedExample], stop_ids: frozenset[int]) -> Check:
    """Every completion ends with an end marker under the loss."""
    without = sum(not (whole.ids[-1] in stop_ids and whole.loss_mask[-1]) for _, whole in examples)
    return Check(
        "end marker is in the loss",
        without == 0,
        f"{without} of {len(examples)} completions have no end marker in the loss; should be 0",
        "use a tokenizer with <|end|> or an end-of-text token, and another token for padding",
    )


def check_different(pairs: Sequence[PreferenceExample]) -> Check:
    """Chosen and rejected completions differ, and no margin is negative."""
    equal = sum(chosen.ids == rejected.ids for chosen, rejected in (p.completions for p in pairs))
    negative = sum(pair.label < 0 for pair in pairs)
    return Check(
        "chosen and rejected differ",
        equal == negative == 0,
        f"of {len(pairs)} pairs {equal} have equal completions and {negative} a negative margin; "
        "both should be 0",
        "remove equal pairs; in pairs with a negative margin swap chosen and rejected",
    )


# Completions and log-probabilities.


def check_completions_end(completions: Sequence[Completion]) -> Check:
    """The model sometimes samples an end marker."""
    ended = sum(completion.ended for completion in completions)
    return Check(
        "model ends its completions",
        ended > 0,
        f"{ended} of {len(completions)} sampled completions end before --max-new-tokens; should "
        "be 1 or more",
        "fine-tune the checkpoint with `openpalm sft` first, or raise --max-new-tokens",
    )


def check_sampler(sampled: Tensor, trained: Tensor) -> Check:
    """Log-probabilities [tokens] of the engine equal those that training computes."""
    difference, allowed = _difference(sampled, trained)
    return Check(
        "sampler and trained policy agree",
        difference <= allowed,
        f"log-probabilities of sampled tokens differ by up to {difference:.2g} nats; should be at "
        f"most {allowed:.2g}",
        "sample from the current weights in float32, without top-k and top-p, at the training "
        "temperature; --rollout-dtype corrects for fewer bits",
    )


def check_dropout(first: Tensor, second: Tensor) -> Check:
    """Two passes over the same completions give equal log-probabilities."""
    difference = (first - second).abs().max().item()
    return Check(
        "dropout is off",
        torch.equal(first, second),
        f"log-probabilities of two passes differ by {difference:.2g} nats; should be 0",
        "call model.eval() before computing log-probabilities",
    )


def check_ratio(old: Tensor, now: Tensor, mask: Tensor) -> Check:
    """The probability ratio of an unchanged policy is 1 on every token."""
    difference, allowed = _difference(old[mask], now[mask])
    return Check(
        "probability ratio is 1 at step 0",
        difference <= allowed,
        f"the ratio of the unchanged policy is up to {math.exp(min(difference, 700)):.6f}; should "
        "be 1",
        "compute old and new log-probabilities from the same weights, temperature and tokens",
    )


def check_reference(policy: Tensor, reference: Tensor, mask: Tensor) -> Check:
    """The run starts at its reference model."""
    difference, allowed = _difference(policy[mask], reference[mask])
    return Check(
        "KL to the reference is 0 at step 0",
        difference <= allowed,
        f"policy and reference differ by up to {difference:.2g} nats per token; should be at most "
        f"{allowed:.2g}",
        "the reference must be the checkpoint that --init names; a new adapter must add nothing",
    )


def check_pair_loss(loss: float) -> Check:
    """The DPO loss of a policy equal to its reference is log 2."""
    return Check(
        "DPO loss is ln 2 at step 0",
        abs(loss - math.log(2)) <= 1e-4,
        f"the loss is {loss:.4f}; should be {math.log(2):.4f}",
        "compute the reference's log-probabilities over the same tokens as the policy's, from the "
        "checkpoint that --init names",
    )


# Rewards.


def check_finite(rewards: Sequence[float]) -> Check:
    """No reward is nan or infinite."""
    wrong = sum(not math.isfinite(reward) for reward in rewards)
    return Check(
        "rewards are finite",
        wrong == 0,
        f"{wrong} of {len(rewards)} rewards are nan or infinite; should be 0",
        "return a finite number for every completion, the empty one included",
    )


def check_varying(rewards: Sequence[float], num_completions: int) -> Check:
    """The completions of some prompt have different rewards; rewards are in order of prompts."""
    equal = zero_variance(torch.tensor(rewards), num_completions)
    return Check(
        "rewards vary",
        not bool(equal.all()),
        f"{int(equal.sum())} of {len(equal)} prompts have equal rewards for all completions; "
        "should not be all",
        "equal rewards teach nothing: use easier prompts, more --num-completions, a higher "
        "--temperature, or a reward that distinguishes completions",
    )


def check_batch_independent(batched: Sequence[float], alone: Sequence[float]) -> Check:
    """A completion has the same reward in a batch, where it may be padded, and alone."""
    difference = max(abs(a - b) for a, b in zip(batched, alone, strict=True))
    allowed = 1e-4 * max(1.0, *map(abs, batched))
    return Check(
        "reward is independent of the batch",
        difference <= allowed,
        f"rewards of single completions differ from rewards in a batch by up to {difference:.2g}; "
        f"should be at most {allowed:.2g}",
        "read the last real token, not the padding, and use no random numbers in the reward",
    )


def check_reward_position(placed: Tensor, rewards: Tensor, mask: Tensor) -> Check:
    """Each of the rewards [rows] is on the last real token of its completion.

    placed: float [rows, time], rewards of tokens; mask: bool [rows, time], completion tokens.
    """
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=-1)
    wanted = torch.zeros_like(placed).scatter_(1, last[:, None], rewards[:, None])
    wrong = int((placed != wanted).any(dim=-1).sum())
    return Check(
        "reward is on the last token",
        wrong == 0,
        f"{wrong} of {len(rewards)} rewards are on other tokens; should be 0",
        "put the reward on the last real token of the completion, also of a truncated one",
    )


def check_order(chosen: Sequence[float], rejected: Sequence[float]) -> Check:
    """The reward prefers the chosen completion at least as often as the rejected one."""
    both = list(zip(chosen, rejected, strict=True))
    better, worse = sum(a > b for a, b in both), sum(a < b for a, b in both)
    return Check(
        "chosen and rejected are not swapped",
        better >= worse,
        f"of {len(both)} pairs the reward prefers the chosen completion in {better}, the rejected "
        f"one in {worse}; the first number should not be smaller",
        "swap chosen and rejected, or change the sign of the reward, whichever is wrong",
    )


# The optimizer step.


def check_optimizer(model: Transformer, optimizer: Optimizer) -> Check:
    """The optimizer holds exactly the trained parameters: of an adapter, all its factors."""
    held = {id(p) for part in optimizer.parts for g in part.param_groups for p in g["params"]}
    adapter = lora.adapter_parameters(model)
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name in adapter if adapter else parameter.requires_grad)
    }
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    extra = len(held) - (len(trained) - len(missing))
    return Check(
        "optimizer holds the trained parameters",
        bool(trained) and not missing and extra == 0,
        f"of {len(trained)} trained tensors {len(missing)} are not in the optimizer, and {extra} "
        "other tensors are; both should be 0",
        "attach the adapter before creating the optimizer",
    )


def check_frozen_reference(before: str, after: str) -> Check:
    """Digests of the reference's weights before and after a step of the policy are equal."""
    same = before == after
    return Check(
        "reference weights are frozen",
        same,
        f"a training step {'leaves' if same else 'changes'} the reference's weights"
        + ("" if same else "; they should stay the same"),
        "the reference must share no parameter with the policy and be in no optimizer",
    )


LossFunction = Callable[[Tensor, Tensor], Tensor]
"""The scalar loss of inputs and targets."""


def check_masked(
    model: Transformer, loss_of: LossFunction, inputs: Tensor, targets: Tensor
) -> Check:
    """Tokens after the completion do not change the gradient."""
    # Reversed cumulative maximum: True up to the last target of each row.
    real = (targets != IGNORE).flip(-1).cummax(dim=-1).values.flip(-1)
    gradients = []
    for filler in (0, model.config.vocab_size - 1):
        model.zero_grad()
        loss_of(inputs.where(real, filler), targets).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    difference = (gradients[0] - gradients[1]).abs().max().item()
    allowed = TOLERANCE * gradients[0].abs().max().item()
    return Check(
        "masked tokens have no gradient",
        difference <= allowed,
        f"other padding changes the gradient by {difference:.2g}; should be at most {allowed:.2g}",
        "sum the loss over the mask only, and divide by the number of tokens in the mask",
    )


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference of log-probabilities, infinite for nan, and the allowed one."""
    difference = (a - b).abs().max().item()
    if not math.isfinite(difference):
        return math.inf, TOLERANCE
    return difference, TOLERANCE * max(1.0, b.abs().max().item())
