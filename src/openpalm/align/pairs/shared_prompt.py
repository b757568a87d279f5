"""Answers to one prompt in one row: the prompt is computed once, not once an answer.

    ids         p0 p1 p2 | a0 a1 a2 | b0 b1
    segments     0  0  0 |  1  1  1 |  2  2
    positions    0  1  2 |  3  4  5 |  3  4
    sees         prompt  | prompt, a | prompt, b

An answer never sees another one and its positions go on from the prompt's end, so every state is
what it would be in a row of its own. The prompt's last token predicts the first of each answer,
which is why targets lie apart from the inputs and say where each is read. For a pair of answers as
long as their prompt this is three quarters of the work.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from openpalm.data.batches.loader import IGNORE, PAD_MULTIPLE
from openpalm.data.text.conversation import Example

WORTH_SHARING = 0.9
"""Tokens in shared rows, of those in rows of their own, up to which sharing is faster."""


class SharedRows(NamedTuple):
    """inputs, segments: int64 [prompts, time]; targets, reads: int64 [answers, tokens].

    Answers lie as number, then prompt: the first answer of every prompt, then every second.
    `reads` is the place in the flattened inputs that predicts a target.
    """

    inputs: Tensor
    segments: Tensor
    targets: Tensor
    reads: Tensor


def common_prompt(group: Sequence[Example]) -> int:
    """Tokens that these records begin with alike, before any that counts."""
    columns = zip(*(record.ids for record in group), strict=False)
    alike = len(list(takewhile(lambda ids: len(set(ids)) == 1, columns)))
    return min(alike, *(record.loss_mask.index(True) for record in group))


def row_length(group: Sequence[Example]) -> int:
    """Inputs of the row that these records share; the last token of each is only a target."""
    prompt = common_prompt(group)
    return prompt + sum(len(record.ids) - prompt - 1 for record in group)


def saves_work(groups: Sequence[Sequence[Example]]) -> bool:
    """Whether these groups, each with a common beginning, are computed faster in shared rows."""
    if not all(map(common_prompt, groups)):
        return False
    alone = len(groups[0]) * max(len(record.ids) - 1 for group in groups for record in group)
    return max(map(row_length, groups)) <= WORTH_SHARING * alone


def share(groups: Sequence[Sequence[Example]]) -> SharedRows:
    """Rows of equally many records each, with a common beginning of at least one token.

    Padding, on the right, is in no segment (-1) and never a target.
    """
    numbers, widest = len(groups[0]), max(map(row_length, groups))
    time = -(-widest // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = max(len(r.ids) - common_prompt(group) for group in groups for r in group)
    inputs = torch.zeros(len(groups), time, dtype=torch.int64)
    segments = torch.full_like(inputs, -1)
    targets = torch.full((numbers, len(groups), tokens), IGNORE)
    reads = torch.zeros_like(targets)
    for row, group in enumerate(groups):
        prompt = end = common_prompt(group)
        assert prompt, "nothing is shared"
        inputs[row, :prompt] = torch.tensor(group[0].ids[:prompt])
        segments[row, :prompt] = 0
        for number, (ids, loss_mask) in enumerate(group):
            answer, counts = torch.tensor(ids[prompt:]), torch.tensor(loss_mask[prompt:])
            begin, end = end, end + len(answer) - 1
            inputs[row, begin:end] = answer[:-1]
            segments[row, begin:end] = number + 1
            targets[number, row, : len(answer)] = answer.where(counts, IGNORE)
            places = torch.arange(begin - 1, end)
            places[0] = prompt - 1
            reads[number, row, : len(answer)] = places + row * time
    return SharedRows(inputs, segments, targets.flatten(0, 1), reads.flatten(0, 1))
