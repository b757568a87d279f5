"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are good or bad alone.

For a prompt x and an answer y, with the policy pi and the reference ref (their equations 7 to 9):

    r(x, y) = log(pi(y|x) / ref(y|x))                                   the implied reward
    z0      = max(0, mean over the batch of log(pi(y'|x) / ref(y'|x)))  where people stand
    v(x, y) = lambda_D s(beta (r - z0))  if y is good                   what y is worth to them
              lambda_U s(beta (z0 - r))  if y is bad
    loss    = lambda_y - v(x, y)

s is the logistic function. y' is an answer to another prompt: z0 estimates KL(pi || ref), and no
gradient goes through it. Unlike a pair's, a verdict's loss is bounded: what is hopeless is let go.
Where good and bad verdicts are not equally many, the paper asks that lambda_D times the good ones
be 1 to 4/3 times lambda_U times the bad ones.

A departure: y' is not drawn from the batch but is, for the whole run, the answer to the next other
prompt in the file, so that the reference's part of z0 is computed once before the run like all of
the reference. And z0 is of a microbatch: unlike our other losses this one depends on how a step's
verdicts are cut into microbatches, though the gradient of each verdict only through z0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs import pairs
from openpalm.align.pairs.pairs import PairBatch, PairRecord, answer_record, fitted
from openpalm.data.rows.preferences import Usable, Verdict
from openpalm.data.text.conversation import Example
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, count_of
from openpalm.model.transformer import Transformer
from openpalm.train.objective import Metrics


@dataclass(frozen=True, slots=True)
class VerdictRecord:
    """An answer and, after the same prompt, the answer to another; the first is good or bad."""

    pair: PairRecord
    good: bool

    @property
    def sides(self) -> tuple[Example, ...]:
        return self.pair.sides

    @property
    def label(self) -> float:
        return float(self.good)


@dataclass(frozen=True, slots=True)
class VerdictBatch:
    """answers: two rows a verdict, the judged answers' half first; good: bool [verdicts]."""

    answers: PairBatch
    good: Tensor

    def to(self, device: torch.device | str) -> "VerdictBatch":
        return VerdictBatch(self.answers.to(device), self.good.to(device))


class VerdictObjective:
    """Sums the loss over verdicts."""

    def __init__(self, settings: DpoSettings):
        self.settings = settings

    def count(self, batch: VerdictBatch, /) -> int:
        """Verdicts."""
        return len(batch.good)

    def loss(self, model: Transformer, batch: VerdictBatch, /) -> tuple[Tensor, Metrics]:
        answers = batch.answers
        halves = (t.chunk(2) for t in (answers.inputs, answers.targets, answers.reference))
        judged, others = zip(*halves, strict=True)
        with torch.no_grad():
            stands = reference_point(_log_ratios(model, *others))
        losses, gains = verdict_losses(
            self.settings, _log_ratios(model, *judged), stands, batch.good
        )
        metrics = {
            "accuracy": (gains > 0).float().sum().item(),
            "reward_margin": gains.sum().item(),
            "kl": stands.item() * len(losses),
        }
        return losses.sum(), metrics


def verdict_losses(
    settings: DpoSettings, log_ratios: Tensor, stands: Tensor, good: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses, and by how much each implied reward, times beta, is on the right side of z0.

    log_ratios: r of the judged answers [verdicts]; stands: z0; good: bool [verdicts].
    """
    sign = torch.where(good, 1.0, -1.0)
    weights = torch.where(good, settings.desirable_weight, settings.undesirable_weight)
    gains = sign * settings.strength * (log_ratios - stands)
    return weights * (1 - gains.sigmoid()), gains.detach()


def reference_point(log_ratios: Tensor) -> Tensor:
    """z0 of the log-ratios of answers to other prompts."""
    return log_ratios.mean().clamp_min(0)


def records(
    tokenizer: Tokenizer, verdicts: Usable[Verdict], sequence_length: int
) -> Usable[VerdictRecord]:
    """The verdicts that fit, and why the others are left out; answers to other prompts are cut.

    Raises DataError where all are of one prompt.
    """

    def fitting(verdict: Verdict) -> tuple[Verdict, Example] | str:
        made = answer_record(tokenizer, verdict.prompt, verdict.answer)
        answer = fitted(made, sequence_length + 1)
        return answer if isinstance(answer, str) else (verdict, answer)

    found = verdicts.then(fitting)
    partners = others([verdict.prompt for verdict, _ in found.items]) if found.items else []
    after = [found.items[i][1] for i in partners]
    made = [
        VerdictRecord(PairRecord(answer, _after(answer, other, sequence_length)), verdict.good)
        for (verdict, answer), other in zip(found.items, after, strict=True)
    ]
    return Usable(made, found.unused, found.places, found.left_out, found.fields)


def others(prompts: Sequence[object]) -> list[int]:
    """For each prompt the next place, round the end, with another. Raises DataError without."""
    if all(prompt == prompts[0] for prompt in prompts):
        raise DataError(
            f"{count_of(len(prompts), 'verdict')} of one prompt only; kto needs answers to at "
            "least two"
        )
    count = len(prompts)
    found = [0] * count
    for i in reversed(range(2 * count)):  # twice round: the second time all that follows is known
        here, following = i % count, (i + 1) % count
        same = prompts[here] == prompts[following]
        found[here] = found[following] if same else following
    return found


def _after(record: Example, other: Example, sequence_length: int) -> Example:
    """The prompt of `record` with the answer of `other`."""
    prompt, answer = record.loss_mask.index(True), other.loss_mask.index(True)
    ids = record.ids[:prompt] + other.ids[answer:]
    counts = record.loss_mask[:prompt] + other.loss_mask[answer:]
    return Example(ids[: sequence_length + 1], counts[: sequence_length + 1])


def with_reference(model: Transformer, verdicts: Sequence[VerdictRecord]) -> list[VerdictRecord]:
    """The verdicts with what `model`, the reference, thinks of both answers; in float32."""
    known = pairs.with_reference(model, [verdict.pair for verdict in verdicts])
    return [replace(v, pair=pair) for v, pair in zip(verdicts, known, strict=True)]


def collate(verdicts: Sequence[VerdictRecord]) -> VerdictBatch:
    """One batch, padded on the right; padding is never a target."""
    good = torch.tensor([verdict.good for verdict in verdicts])
    return VerdictBatch(pairs.collate([verdict.pair for verdict in verdicts]), good)


def _log_ratios(model: Transformer, inputs: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    return token_log_probs(model, inputs, targets).sum(dim=-1) - reference
