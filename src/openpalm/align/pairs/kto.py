"""Kahneman-Tversky optimisation (KTO, Ethayarajh et al. 2024): completions labelled good or bad.

KTO needs no pairs: every completion y of a prompt x has a label of its own, desirable or
undesirable. With the policy pi and the reference ref (the paper's equations 7 to 9):

    r(x, y) = log(pi(y|x) / ref(y|x))                          implied reward
    z0      = max(0, batch mean of log(pi(y'|x) / ref(y'|x)))  reference point, estimates KL(pi|ref)
    v(x, y) = lambda_D sigmoid(beta (r - z0))                  value of a desirable completion
              lambda_U sigmoid(beta (z0 - r))                  value of an undesirable completion
    loss    = lambda_y - v(x, y)

y' is a mismatched completion: one that answers another prompt. No gradient flows through z0. Each
loss lies between 0 and lambda_y, so a hopeless completion stops pulling. Where the numbers of
desirable and undesirable completions differ, the paper wants lambda_D n_D / (lambda_U n_U) to be
between 1 and 4/3.

Departures. The paper draws y' from the batch; here it is, for the whole run, the completion of the
next other prompt in the file, so the reference model scores it once before the run. And z0 is the
mean of a microbatch: unlike our other losses, this one depends on how a step is divided into
microbatches, though only through z0.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.examples import PreferenceBatch, PreferenceExample
from openpalm.data.text.conversation import Example
from openpalm.errors import DataError, count_of
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


class KtoObjective:
    """Sums the KTO loss over labelled completions, each with its mismatched completion."""

    def __init__(self, settings: DpoSettings):
        self.settings = settings

    def count(self, batch: PreferenceBatch, /) -> int:
        """Labelled completions."""
        return len(batch)

    def loss(self, model: Transformer, batch: PreferenceBatch, /) -> tuple[Tensor, Metrics]:
        halves = (t.chunk(2) for t in (batch.inputs, batch.targets, batch.reference))
        labelled, mismatched = zip(*halves, strict=True)
        with torch.no_grad():
            z0 = reference_point(_log_ratios(model, *mismatched))
        losses, gains = kto_losses(
            self.settings, _log_ratios(model, *labelled), z0, desirable=batch.labels > 0
        )
        metrics = {
            "accuracy": (gains > 0).float().sum().item(),
            "reward_margin": gains.sum().item(),
            "kl": z0.item() * len(losses),
        }
        return losses.sum(), metrics


def kto_losses(
    settings: DpoSettings, log_ratios: Tensor, z0: Tensor, desirable: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses, and beta (r - z0) with the sign of the label: above 0 is on the right side.

    log_ratios: r, float [completions]; z0: the reference point; desirable: bool [completions].
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
    gains = sign * settings.resolved_beta * (log_ratios - z0)
    return weights * (1 - gains.sigmoid()), gains.detach()


def reference_point(log_ratios: Tensor) -> Tensor:
    """z0, from the log-ratios of mismatched completions."""
    return log_ratios.mean().clamp_min(0)


def _log_ratios(model: Transformer, inputs: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    return token_log_probs(model, inputs, targets).sum(dim=-1) - reference


def with_mismatched(
    examples: Sequence[PreferenceExample], sequence_length: int
) -> list[PreferenceExample]:
    """Adds to each example, as its second completion, the completion of the next other prompt.

    A mismatched completion that is too long is cut. Raises DataError where all examples have one
    prompt.
    """
    completions = [example.completions[0] for example in examples]
    prompts = [tuple(c.ids[: _prompt_length(c)]) for c in completions]
    partners = next_other_prompts(prompts)
    return [
        replace(
            example,
            completions=(own, _mismatched(own, completions[partner], sequence_length)),
        )
        for example, own, partner in zip(examples, completions, partners, strict=True)
    ]


def next_other_prompts(prompts: Sequence[object]) -> list[int]:
    """For each prompt the place of the next different one, cyclically. Raises DataError if none."""
    if all(prompt == prompts[0] for prompt in prompts):
        raise DataError(
            f"{count_of(len(prompts), 'labelled completion')}, all of one prompt; kto compares "
            "with completions of other prompts: give at least two prompts"
        )
    count = len(prompts)
    found = [0] * count
    # Backwards, because a prompt equal to the next one shares its result; twice, because the last
    # prompts need the results of the first ones.
    for i in reversed(range(2 * count)):
        here, following = i % count, (i + 1) % count
        same = prompts[here] == prompts[following]
        found[here] = found[following] if same else following
    return found


def _mismatched(own: Example, other: Example, sequence_length: int) -> Example:
    """The prompt of `own` with the completion of `other`."""
    prompt, completion = _prompt_length(own), _prompt_length(other)
    ids = own.ids[:prompt] + other.ids[completion:]
    loss_mask = own.loss_mask[:prompt] + other.loss_mask[completion:]
    return Example(ids[: sequence_length + 1], loss_mask[: sequence_length + 1])


def _prompt_length(example: Example) -> int:
    return example.loss_mask.index(True)
