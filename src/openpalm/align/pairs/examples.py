"""Preference examples: a prompt with its judged completions, from rows to batches.

DPO, KTO and reward models share this one mechanism. A pair has a chosen and a rejected completion;
a rating or a KTO label belongs to a single one. The reference model scores all completions once,
before the run, and its log-probabilities travel with the examples: training needs no second model.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.shared_prompt import saves_work, share
from openpalm.data.batches.loader import Example, Loader, padded
from openpalm.data.batches.order import shuffle
from openpalm.data.rows.preferences import LabelledCompletion, Pair, Rating
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.layout import shared_prompt_layout
from openpalm.model.transformer import Transformer

J = TypeVar("J", Pair, LabelledCompletion, Rating)
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One judgement: one or two completions of a prompt, and the label that it gives them."""

    completions: tuple[Example, ...]
    """prompt and completion, the loss mask on the completion alone; the chosen one comes first"""
    label: float = 0.0
    """margin of a pair, rating, or 1 for a desirable and 0 for an undesirable completion"""
    reference: tuple[float, ...] = (0.0, 0.0)
    """log-probabilities of two completions under the reference model"""


@dataclass(frozen=True, slots=True)
class PreferenceBatch:
    """Examples of two completions each: the first one of every example, then the second ones.

    inputs, targets: int64 [2 examples, time]; labels: float32 [examples]; reference: float32
    [2 examples]. With shared prompts inputs and `segments` are [examples, time], targets and
    `reads` [2 examples, tokens]; see SharedRows.
    """

    inputs: Tensor
    targets: Tensor
    labels: Tensor
    reference: Tensor
    segments: Tensor | None = None
    reads: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if v is not None})

    def log_probs(self, model: Transformer) -> Tensor:
        """Log-probability of each completion token, 0 elsewhere; the shape of `targets`."""
        layout = None if self.segments is None else shared_prompt_layout(self.segments)
        return token_log_probs(model, self.inputs, self.targets, layout, self.reads)


def to_examples(
    tokenizer: Tokenizer, judgements: ReadResult[J], max_tokens: int
) -> ReadResult[PreferenceExample]:
    """The judgements with completions of at most `max_tokens` tokens, prompt included.

    The others are counted by reason.
    """
    return judgements.map(lambda judgement: to_example(tokenizer, judgement, max_tokens))


def to_example(
    tokenizer: Tokenizer, judgement: Pair | LabelledCompletion | Rating, max_tokens: int
) -> PreferenceExample | str:
    """The training example, or the reason for leaving the judgement out."""
    match judgement:
        case Pair(prompt, chosen, rejected, margin):
            completions, label = (chosen, rejected), margin or 0.0
        case LabelledCompletion(prompt, completion, desirable):
            completions, label = (completion,), float(desirable)
        case Rating(prompt, completion, _, value):
            completions, label = (completion,), float(value)
    rendered = []
    for completion in completions:
        example = render_completion(tokenizer, prompt, completion)
        if len(example.ids) > max_tokens:  # cut, it would have no end to learn from
            return f"longer than {max_tokens} tokens, see --sequence-length"
        if not any(example.loss_mask):
            return "no turn of the completion has a weight"
        rendered.append(example)
    return PreferenceExample(tuple(rendered), label)


def render_completion(
    tokenizer: Tokenizer, prompt: Sequence[Message], completion: Sequence[Message]
) -> Example:
    """The conversation's ids; the loss mask is on the completion's assistant turns and their ends.

    The prompt's own assistant turns carry no loss: both completions of a pair share them.
    """
    before = render(tokenizer, prompt, add_generation_prompt=True).ids
    ids, loss_mask = render(tokenizer, [*prompt, *completion])
    assert ids[: len(before)] == before, "a prompt's ids depend on the completion that follows"
    return Example(ids, [False] * len(before) + loss_mask[len(before) :])


@torch.no_grad()
def with_reference(
    model: Transformer, examples: Sequence[PreferenceExample], rows: int = 16
) -> list[PreferenceExample]:
    """The examples with log-probabilities of their two completions under `model`, in float32."""
    device, done = model.embedding.device, []
    for start in range(0, len(examples), rows):
        group = examples[start : start + rows]
        sums = collate_shared(group).to(device).log_probs(model).sum(dim=-1)
        of_examples = sums.cpu().view(2, len(group)).T.tolist()
        done += [
            replace(example, reference=tuple(both))
            for example, both in zip(group, of_examples, strict=True)
        ]
    return done


def in_batch_order(examples: Sequence[PreferenceExample]) -> list[Example]:
    """The first completion of every example, then the second ones, if there are two."""
    columns = zip(*(example.completions for example in examples), strict=True)
    return [completion for column in columns for completion in column]


def collate(examples: Sequence[PreferenceExample]) -> PreferenceBatch:
    """One batch with a row for each completion, padded on the right; padding is no target."""
    rows = in_batch_order(examples)
    inputs, targets = padded(rows, max(len(row.ids) for row in rows) - 1)
    return PreferenceBatch(inputs, targets, labels(examples), _references(examples))


def collate_shared(examples: Sequence[PreferenceExample]) -> PreferenceBatch:
    """One batch with a row for each prompt where that saves work, otherwise as `collate`."""
    groups = [example.completions for example in examples]
    if not saves_work(groups):
        return collate(examples)
    rows = share(groups)
    known = labels(examples), _references(examples)
    return PreferenceBatch(rows.inputs, rows.targets, *known, rows.segments, rows.reads)


def labels(examples: Sequence[PreferenceExample]) -> Tensor:
    """float32 [examples]."""
    return torch.tensor([example.label for example in examples], dtype=torch.float32)


def _references(examples: Sequence[PreferenceExample]) -> Tensor:
    return torch.tensor([example.reference for example in examples]).T.flatten()


def preference_loader(
    examples: Sequence[PreferenceExample],
    *,
    rows: int,
    seed: int,
    collate: Callable[[Sequence[PreferenceExample]], B],
    rank: int = 0,
    world_size: int = 1,
) -> Loader[B]:
    """Batches of `rows` examples a process, shuffled every epoch."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        for completion in example.completions:
            digest.update(repr(completion.ids).encode())
    return Loader(
        shuffle(len(examples), seed),
        lambda numbers: collate([examples[i] for i in numbers]),
        {"kind": "pairs", "seed": seed, "pairs": len(examples), "sample": digest.hexdigest()},
        rows=rows,
        rank=rank,
        world_size=world_size,
    )
