"""What is checked before a preference or RL run: the silent bugs of the field.

None of them stops a run; each makes it learn something else than was meant. A check is a pure
function of what was measured: it names itself, says what was found, and what to do where it fails.
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
"""Of log-probabilities in float32, for each nat of the largest one."""


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    remedy: str


class PromptedExample(NamedTuple):
    """A prompt's ids as an answer is asked for, and the conversation with the answer."""

    before: list[int]
    whole: Example


def check_prefix(examples: Sequence[PromptedExample]) -> Check:
    """A prompt is read as in training, and its answer is what is learnt."""
    wrong = [
        number
        for number, (before, whole) in enumerate(examples)
        if whole.ids[: len(before)] != before
        or whole.loss_mask[len(before) - 1 : len(before) + 1] != [False, True]
    ]
    return Check(
        "masks follow the template",
        not wrong,
        f"the loss of {len(wrong)} of {len(examples)} answers does not begin behind their prompt",
        "a prompt's ids must be a prefix of the conversation's: render both with "
        "openpalm.data.text.conversation, and with the checkpoint's own tokenizer",
    )


def check_end(examples: Sequence[PromptedExample], stop_ids: frozenset[int]) -> Check:
    """Every answer's end marker is supervised."""
    without = sum(not (whole.ids[-1] in stop_ids and whole.loss_mask[-1]) for _, whole in examples)
    return Check(
        "the end marker is learnt",
        without == 0,
        f"{without} of {len(examples)} answers have no end marker in the loss",
        "take a tokenizer with <|end|> or an end of text, and do not use it as padding",
    )


def check_ended(answers: Sequence[Completion]) -> Check:
    """The model sometimes ends its answers."""
    ended = sum(answer.ended for answer in answers)
    return Check(
        "answers come to an end",
        ended > 0,
        f"{ended} of {len(answers)} sampled answers end before they are cut",
        "fine-tune the checkpoint with `openpalm sft` first, or raise --max-new-tokens",
    )


def check_sampler(sampled: Tensor, trained: Tensor) -> Check:
    """The engine's log-probabilities [tokens] are those that are trained on."""
    apart, allowed = _apart(sampled, trained)
    return Check(
        "the sampler is the trained policy",
        apart <= allowed,
        f"log-probabilities of the answers differ by {apart:.2g} (allowed {allowed:.2g})",
        "sample from the live weights in float32, without top-k and top-p, at the trained "
        "temperature; --rollout-dtype corrects for fewer bits",
    )


def check_dropout(first: Tensor, second: Tensor) -> Check:
    """Two looks at the same answers see the same."""
    same = torch.equal(first, second)
    apart = (first - second).abs().max().item()
    return Check(
        "dropout is off",
        same,
        "two looks are equal" if same else f"two looks at the same answers differ by {apart:.2g}",
        "put the model into eval mode where old log-probabilities are computed",
    )


def check_ratio(old: Tensor, now: Tensor, mask: Tensor) -> Check:
    """The probability ratio of a policy that has not moved is one, on every token."""
    apart, allowed = _apart(old[mask], now[mask])
    return Check(
        "the ratio is 1 at step 0",
        apart <= allowed,
        f"the ratio of the unchanged policy is up to {math.exp(min(apart, 700)):.6f}",
        "old log-probabilities must be of the same weights, temperature and tokens as new ones",
    )


def check_reference(policy: Tensor, reference: Tensor, mask: Tensor) -> Check:
    """A run begins at its reference."""
    apart, allowed = _apart(policy[mask], reference[mask])
    return Check(
        "KL to the reference is 0 at step 0",
        apart <= allowed,
        f"policy and reference differ by up to {apart:.2g} nats a token (allowed {allowed:.2g})",
        "the reference must be the very checkpoint that --init names; a fresh adapter adds nothing",
    )


def check_kept(before: str, after: str) -> Check:
    """Digests of the reference's weights, before and after a step of the policy."""
    return Check(
        "the reference stays as it is",
        before == after,
        "its weights are the same" if before == after else "a step changed its weights",
        "the reference must share no parameter with the policy, and be in no optimizer",
    )


def check_finite(rewards: Sequence[float]) -> Check:
    """Rewards are numbers."""
    odd = sum(not math.isfinite(reward) for reward in rewards)
    return Check(
        "rewards are finite",
        odd == 0,
        f"{odd} of {len(rewards)} rewards are nan or infinite",
        "make the reward return a finite number for every answer, the empty one too",
    )


def check_varying(rewards: Sequence[float], answers: int) -> Check:
    """Some prompt's answers differ in worth; `answers` to a prompt, one after another."""
    equal = zero_variance(torch.tensor(rewards), answers)
    return Check(
        "rewards vary",
        not bool(equal.all()),
        f"{int(equal.sum())} of {len(equal)} prompts have equal rewards for all their answers",
        "nothing can be learnt from equal rewards: take easier prompts, more "
        "--num-completions, a higher --temperature, or a reward that tells answers apart",
    )


def check_alone(together: Sequence[float], alone: Sequence[float]) -> Check:
    """An answer is worth the same whatever is rewarded, and padded, beside it."""
    pairs = zip(together, alone, strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    allowed = 1e-4 * max(1.0, *map(abs, together))
    return Check(
        "a reward reads its own answer",
        apart <= allowed,
        f"rewards differ by up to {apart:.2g} where answers are rewarded one at a time",
        "the reward must read the last real token and not the padding, and draw nothing at random",
    )


def check_place(placed: Tensor, rewards: Tensor, mask: Tensor) -> Check:
    """Rewards [rows] lie on the last real token of their answer, in placed [rows, time]."""
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).amax(dim=-1)
    wanted = torch.zeros_like(placed).scatter_(1, last[:, None], rewards[:, None])
    wrong = int((placed != wanted).any(dim=-1).sum())
    return Check(
        "a reward lies on the last token",
        wrong == 0,
        f"{wrong} of {len(rewards)} rewards lie elsewhere",
        "put it on the answer's last real token, also where the answer was cut",
    )


def check_different(pairs: Sequence[PreferenceExample]) -> Check:
    """Chosen and rejected are two answers, and no margin says the opposite."""
    equal = sum(chosen.ids == rejected.ids for chosen, rejected in (p.completions for p in pairs))
    negative = sum(pair.label < 0 for pair in pairs)
    return Check(
        "chosen and rejected differ",
        equal == negative == 0,
        f"of {len(pairs)} pairs {equal} are equal and {negative} have a margin below 0",
        "leave equal pairs out; where a margin is below 0, chosen and rejected are swapped",
    )


def check_order(chosen: Sequence[float], rejected: Sequence[float]) -> Check:
    """The reward likes the chosen answers at least as often as the rejected ones."""
    both = list(zip(chosen, rejected, strict=True))
    better, worse = sum(a > b for a, b in both), sum(a < b for a, b in both)
    return Check(
        "chosen and rejected are not swapped",
        better >= worse,
        f"the reward likes the chosen answer more in {better} of {len(both)} pairs, "
        f"less in {worse}",
        "exchange chosen and rejected, or the sign of the reward, whichever is wrong",
    )


def check_pair_loss(loss: float) -> Check:
    """The DPO loss of a policy that is its reference is log 2."""
    return Check(
        "the DPO loss is ln 2 at step 0",
        abs(loss - math.log(2)) <= 1e-4,
        f"it is {loss:.4f} (ln 2 is {math.log(2):.4f})",
        "the reference's log-probabilities must be of the same tokens as the policy's, and of the "
        "checkpoint that --init names",
    )


def check_optimizer(model: Transformer, optimizer: Optimizer) -> Check:
    """What shall learn is in the optimizer, and nothing else; of an adapter all its factors."""
    held = {id(p) for part in optimizer.parts for g in part.param_groups for p in g["params"]}
    adapter = lora.adapter_parameters(model)
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (name in adapter if adapter else parameter.requires_grad)
    }
    missing = [name for name, parameter in wanted.items() if id(parameter) not in held]
    extra = len(held) - (len(wanted) - len(missing))
    return Check(
        "what learns is in the optimizer",
        bool(wanted) and not missing and extra == 0,
        f"{len(wanted)} tensors shall learn, {len(missing)} of them are not in the optimizer, "
        f"{extra} others are",
        "attach the adapter before the optimizer is made",
    )


Losses = Callable[[Tensor, Tensor], Tensor]
"""The scalar loss of inputs and targets."""


def check_masked(model: Transformer, loss_of: Losses, inputs: Tensor, targets: Tensor) -> Check:
    """What stands behind an answer changes no gradient."""
    real = (targets != IGNORE).flip(-1).cummax(dim=-1).values.flip(-1)
    gradients = []
    for filler in (0, model.config.vocab_size - 1):
        model.zero_grad()
        loss_of(inputs.where(real, filler), targets).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    apart = (gradients[0] - gradients[1]).abs().max().item()
    allowed = TOLERANCE * gradients[0].abs().max().item()
    return Check(
        "masked tokens have no gradient",
        apart <= allowed,
        f"other padding changes the gradient by {apart:.2g} (allowed {allowed:.2g})",
        "sum the loss over the mask alone, and divide by what the mask counts",
    )


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How far log-probabilities are apart at most, and may be; nan is as far as can be."""
    apart = (a - b).abs().max().item()
    if not math.isfinite(apart):
        return math.inf, TOLERANCE
    return apart, TOLERANCE * max(1.0, b.abs().max().item())
