"""What is checked before a preference or RL run: the silent bugs of the field, on the user's own
model, data and rewards.

None of them stops a run; each makes it learn something else than was meant. A check is a pure
function of what was measured: it names itself, says what was found, and what to do where it fails.
`examine` measures, in an order in which each check may rely on those before it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openpalm.align.advantages import token_rewards, zero_variance
from openpalm.align.config import DpoSettings, GrpoSettings
from openpalm.align.dpo import PairObjective
from openpalm.align.grpo import GroupObjective, estimate
from openpalm.align.logprobs import evaluate
from openpalm.align.pairs import PairRecord, collate, with_reference
from openpalm.align.rollout import Answer, Reward, RolloutLoader, Sampler, batch_of
from openpalm.data.conversation import render
from openpalm.data.loader import IGNORE, Record
from openpalm.data.preferences import Messages
from openpalm.data.tokenizer import Tokenizer
from openpalm.model import lora
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Objective
from openpalm.train.optim import Optimizer
from openpalm.train.trainer import Trainer

TOLERANCE = 1e-5
"""Of log-probabilities in float32, for each nat of the largest one."""


class Check(NamedTuple):
    name: str
    ok: bool
    found: str
    remedy: str


class Example(NamedTuple):
    """A prompt's ids as an answer is asked for, and the conversation with the answer."""

    before: list[int]
    whole: Record


def check_prefix(examples: Sequence[Example]) -> Check:
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
        "openpalm.data.conversation, and with the checkpoint's own tokenizer",
    )


def check_end(examples: Sequence[Example], stop_ids: frozenset[int]) -> Check:
    """Every answer's end marker is supervised."""
    without = sum(not (whole.ids[-1] in stop_ids and whole.loss_mask[-1]) for _, whole in examples)
    return Check(
        "the end marker is learnt",
        without == 0,
        f"{without} of {len(examples)} answers have no end marker in the loss",
        "take a tokenizer with <|end|> or an end of text, and do not use it as padding",
    )


def check_ended(answers: Sequence[Answer]) -> Check:
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
        "temperature; --rollout-weights corrects for fewer bits",
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
    """Some prompt's answers are not all worth the same; `answers` to a prompt, one after another."""
    equal = zero_variance(torch.tensor(rewards), answers)
    return Check(
        "rewards vary",
        not bool(equal.all()),
        f"{int(equal.sum())} of {len(equal)} prompts have equal rewards for all their answers",
        "nothing can be learnt from equal rewards: take easier prompts, more --answers, a higher "
        "--temperature, or a reward that tells answers apart",
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


def check_different(pairs: Sequence[PairRecord]) -> Check:
    """Chosen and rejected are two answers, and no margin says the opposite."""
    equal = sum(pair.chosen.ids == pair.rejected.ids for pair in pairs)
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


@dataclass(frozen=True)
class Patient:
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
    pairs: Sequence[PairRecord]
    """the reward knows theirs by the numbers that follow"""
    stop_ids: frozenset[int]
    reward: Reward | None


def examine(patient: Patient) -> Iterator[Check]:
    """One check after the other; what the later ones need is measured when they are asked for."""
    examples = [
        Example(
            render(patient.tokenizer, prompt, answer_next=True).ids,
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
    count = min(patient.settings.prompts, len(patient.prompts))
    answers = sampler.answers(range(count), patient.settings.answers)
    yield check_ended(answers)
    yield from _policy_checks(patient, answers)
    if patient.reward is not None:
        yield from _reward_checks(patient, patient.reward, answers)
    if patient.pairs:
        yield from _pair_checks(patient)
    yield from _step_checks(patient, sampler)


def _policy_checks(patient: Patient, answers: Sequence[Answer]) -> Iterator[Check]:
    inputs, targets = _on(patient.model, batch_of(answers))
    mask = targets != IGNORE
    with torch.no_grad():
        first = evaluate(patient.model, inputs, targets).log_probs
        patient.model.train()  # as a step leaves it
        second = evaluate(patient.model, inputs, targets).log_probs
        reference = evaluate(patient.reference, inputs, targets).log_probs
    yield check_dropout(first, second)
    sampled = torch.tensor([value for answer in answers for value in answer.log_probs])
    yield check_sampler(sampled, first[mask].cpu())
    yield check_reference(first, reference, mask)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return -evaluate(patient.model, inputs, targets).log_probs.sum()

    yield check_masked(patient.model, loss_of, inputs, targets)


def _reward_checks(patient: Patient, reward: Reward, answers: Sequence[Answer]) -> Iterator[Check]:
    rewards = [float(value) for value in reward(answers)]
    yield check_finite(rewards)
    yield check_alone(rewards, [float(reward([answer])[0]) for answer in answers])
    yield check_varying(rewards, patient.settings.answers)
    mask = batch_of(answers)[1] != IGNORE
    ones = torch.ones(len(answers))
    yield check_place(token_rewards(ones, mask, torch.zeros(mask.shape)), ones, mask)


def _pair_checks(patient: Patient) -> Iterator[Check]:
    yield check_different(patient.pairs)
    if patient.reward is not None:
        numbered = list(enumerate(patient.pairs, len(patient.prompts)))
        sides = [[_as_answer(n, pair.sides[side]) for n, pair in numbered] for side in (0, 1)]
        chosen, rejected = (list(patient.reward(side)) for side in sides)
        yield check_finite([*chosen, *rejected])
        yield check_order(chosen, rejected)
    batch = collate(with_reference(patient.reference, patient.pairs)).to(
        patient.model.embedding.device
    )
    settings = DpoSettings(data=patient.settings.data, out=patient.settings.out, init="", steps=1)
    patient.model.eval()
    with torch.no_grad():
        loss = PairObjective(settings).loss(patient.model, batch)[0].item()
    yield check_pair_loss(loss / batch.pairs)


def _step_checks(patient: Patient, sampler: Sampler) -> Iterator[Check]:
    settings = patient.settings

    def reference(inputs: Tensor, targets: Tensor) -> Tensor:
        log_probs = evaluate(patient.reference, inputs, targets, temperature=settings.temperature)
        return log_probs.log_probs

    reward = patient.reward or (lambda answers: [0.0] * len(answers))
    rows = settings.prompts * settings.answers
    loader = RolloutLoader(sampler, reward, estimate, reference, rows=rows)
    batch = next(loader).to(patient.model.embedding.device)
    with torch.no_grad():
        now = evaluate(patient.model, batch.inputs, batch.targets, temperature=settings.temperature)
    yield check_ratio(batch.old, now.log_probs, batch.mask)
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


def _apart(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How far log-probabilities are apart at most, and may be; nan is as far as can be."""
    apart = (a - b).abs().max().item()
    scale = max(1.0, b.abs().max().item())
    return (apart if math.isfinite(apart) else math.inf), TOLERANCE * scale


def _last_turn(example: Example) -> Example:
    """Up to the last token that counts: what a template writes behind an end marker is no answer."""
    ids, loss_mask = example.whole
    end = len(ids) - loss_mask[::-1].index(True) if any(loss_mask) else len(ids)
    return Example(example.before, Record(ids[:end], loss_mask[:end]))


def _as_answer(prompt: int, record: Record) -> Answer:
    start = record.loss_mask.index(True)
    ids = record.ids[start:]
    return Answer(prompt, record.ids[:start], ids, [0.0] * len(ids), ended=True)


def _on(model: Transformer, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = (tensor.to(model.embedding.device) for tensor in tensors)
    return inputs, targets
