"""Pairs of answers as batches: the chosen ones, then the rejected ones.

Both are in one row with the prompt that they share, or each in a row of its own.
What the reference thinks of them is computed once, before the run, and travels with the batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.shared_prompt import saves_work, share
from openpalm.data.batches.loader import Loader, padded
from openpalm.data.batches.order import shuffle
from openpalm.data.rows.preferences import Pair, Usable
from openpalm.data.text.conversation import Example, Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.layout import shared_prompt_layout
from openpalm.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class PairRecord:
    """Two answers to one prompt; each a record whose loss mask is on the answer alone."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float] = (0.0, 0.0)
    """log-probabilities of the two answers under the reference"""
    label: float = 0.0
    """the margin: by how much the chosen answer is better, where the data says"""

    @property
    def sides(self) -> tuple[Example, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class PairBatch:
    """inputs, targets: int64 [2 pairs, time], the chosen half first; reference: [2 pairs].

    Where prompts are shared, inputs and `segments` are [pairs, time], targets and `reads`
    [2 pairs, tokens]; see SharedRows.
    """

    inputs: Tensor
    targets: Tensor
    reference: Tensor
    segments: Tensor | None = None
    reads: Tensor | None = None

    @property
    def pairs(self) -> int:
        return len(self.targets) // 2

    def to(self, device: torch.device | str) -> "PairBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if v is not None})

    def log_probs(self, model: Transformer) -> Tensor:
        """Of each answer's tokens, 0 where nothing counts: the shape of `targets`."""
        layout = None if self.segments is None else shared_prompt_layout(self.segments)
        return token_log_probs(model, self.inputs, self.targets, layout, self.reads)


def answer_record(
    tokenizer: Tokenizer, prompt: Sequence[Message], answer: Sequence[Message]
) -> Example:
    """The conversation with its answer; only the assistant's part of that and its end count.

    Earlier turns of the assistant are part of the prompt here: both sides share them.
    """
    before = render(tokenizer, prompt, answer_next=True).ids
    ids, loss_mask = render(tokenizer, [*prompt, *answer])
    assert ids[: len(before)] == before, "a prompt's ids depend on the answer that follows"
    return Example(ids, [False] * len(before) + loss_mask[len(before) :])


def fitted(record: Example, length: int) -> Example | str:
    """An answer of at most `length` tokens, or the reason for leaving it out.

    One that is cut has no end to learn from.
    """
    if len(record.ids) > length:
        return f"longer than {length} tokens, see --sequence-length"
    return record if any(record.loss_mask) else "no turn of the answer has a weight"


def records(tokenizer: Tokenizer, pairs: Usable[Pair], sequence_length: int) -> Usable[PairRecord]:
    """The pairs that fit, and why the others are left out."""
    return fitting(tokenizer, pairs, sequence_length).then(lambda both: both[1])


def fitting(
    tokenizer: Tokenizer, pairs: Usable[Pair], sequence_length: int
) -> Usable[tuple[Pair, PairRecord]]:
    """The pairs that fit, with their records."""

    def made(pair: Pair) -> tuple[Pair, PairRecord] | str:
        sides = []
        for answer in (pair.chosen, pair.rejected):
            side = fitted(answer_record(tokenizer, pair.prompt, answer), sequence_length + 1)
            if isinstance(side, str):
                return side
            sides.append(side)
        return pair, PairRecord(*sides, label=pair.margin or 0.0)

    return pairs.then(made)


@torch.no_grad()
def with_reference(
    model: Transformer, pairs: Sequence[PairRecord], rows: int = 16
) -> list[PairRecord]:
    """The pairs with what `model`, the reference, thinks of their answers; in float32."""
    device, done = model.embedding.device, []
    for start in range(0, len(pairs), rows):
        group = pairs[start : start + rows]
        sums = collate_shared(group).to(device).log_probs(model).sum(dim=-1)
        chosen, rejected = sums.cpu().chunk(2)
        both = zip(chosen.tolist(), rejected.tolist(), strict=True)
        done += [replace(pair, reference=sums) for pair, sums in zip(group, both, strict=True)]
    return done


def collate(pairs: Sequence[PairRecord]) -> PairBatch:
    """One batch of two rows a pair, padded on the right; padding is never a target."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    inputs, targets = padded(rows, max(len(row.ids) for row in rows) - 1)
    return PairBatch(inputs, targets, _references(pairs))


def collate_shared(pairs: Sequence[PairRecord]) -> PairBatch:
    """One batch of one row a pair where that saves work, else as `collate` makes it."""
    groups = [(pair.chosen, pair.rejected) for pair in pairs]
    if not saves_work(groups):
        return collate(pairs)
    rows = share(groups)
    return PairBatch(rows.inputs, rows.targets, _references(pairs), rows.segments, rows.reads)


def _references(pairs: Sequence[PairRecord]) -> Tensor:
    return torch.tensor([pair.reference for pair in pairs]).T.flatten()


class Judged(Protocol):
    """A judgement of one answer, or of two, the better one first."""

    @property
    def sides(self) -> tuple[Example, ...]: ...

    @property
    def label(self) -> float: ...


J = TypeVar("J", bound=Judged)
B = TypeVar("B")


class PairLoader(Loader[B]):
    """Batches of `rows` judgements, shuffled every epoch; its cursor is a place in that order."""

    def __init__(
        self,
        pairs: Sequence[J],
        *,
        rows: int,
        seed: int,
        collate: Callable[[Sequence[J]], B] = collate,
    ):
        digest = hashlib.blake2b(digest_size=8)
        for pair in pairs:
            for record in pair.sides:
                digest.update(repr(record.ids).encode())
        identity = {"kind": "pairs", "seed": seed, "pairs": len(pairs)}
        identity["sample"] = digest.hexdigest()
        super().__init__(
            shuffle(len(pairs), seed),
            lambda numbers: collate([pairs[i] for i in numbers]),
            identity,
            rows=rows,
        )
