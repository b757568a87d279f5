"""Shared prompts: several completions of one prompt in one row, the prompt computed once.

    ids         p0 p1 p2 | a0 a1 a2 | b0 b1
    segments     0  0  0 |  1  1  1 |  2  2
    positions    0  1  2 |  3  4  5 |  3  4
    attends to   prompt  | prompt, a | prompt, b

A completion never attends to another one, and its positions continue from the prompt's end, so
every state equals the state in a row of its own. For a pair with completions as long as the prompt
this is three quarters of the work.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from openpalm.data.batches.loader import IGNORE, PAD_MULTIPLE
from openpalm.data.text.conversation import Example

WORTH_SHARING = 0.9
"""Largest ratio of tokens in shared rows to tokens in separate rows at which sharing is faster."""


class SharedRows(NamedTuple):
    """inputs, segments: int64 [prompts, time]; targets, reads: int64 [completions, tokens].

    Order of completions: the first of every prompt, then the second of every prompt, and so on.
    `reads` is the place in the flattened inputs with the state that predicts a target. Targets
    need it because the prompt's last token predicts the first token of every completion.
    """

    inputs: Tensor
    segments: Tensor
    targets: Tensor
    reads: Tensor


def common_prompt(group: Sequence[Example]) -> int:
    """Number of tokens with which all these examples begin, none of them under a loss."""
    columns = zip(*(example.ids for example in group), strict=False)
    alike = len(list(takewhile(lambda ids: len(set(ids)) == 1, columns)))
    # Completions may begin alike, but each token under a loss needs a place of its own.
    return min(alike, *(example.loss_mask.index(True) for example in group))


def row_length(group: Sequence[Example]) -> int:
    """Inputs of the row that these examples share; the last token of each is only a target."""
    prompt = common_prompt(group)
    return prompt + sum(len(example.ids) - prompt - 1 for example in group)


def saves_work(groups: Sequence[Sequence[Example]]) -> bool:
    """Whether these groups, each with a common prompt, are computed faster in shared rows."""
    if not all(map(common_prompt, groups)):
        return False
    # Rows of a batch are as wide as the longest, so the longest rows are compared.
    separate = len(groups[0]) * max(len(example.ids) - 1 for group in groups for example in group)
    return max(map(row_length, groups)) <= WORTH_SHARING * separate


def share(groups: Sequence[Sequence[Example]]) -> SharedRows:
    """One row for each group; all groups have equally many examples and a common prompt.

    Padding, on the right, is in no segment (-1) and never a target.
    """
    numbers, widest = len(groups[0]), max(map(row_length, groups))
    time = -(-widest // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = max(len(e.ids) - common_prompt(group) for group in groups for e in group)
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
            completion, counts = torch.tensor(ids[prompt:]), torch.tensor(loss_mask[prompt:])
            begin, end = end, end + len(completion) - 1
            # The last token predicts nothing, so it is no input, as in a row of its own.
            inputs[row, begin:end] = completion[:-1]
            segments[row, begin:end] = number + 1
            targets[number, row, : len(completion)] = completion.where(counts, IGNORE)
            # Token i is predicted by token i - 1, but the first one by the prompt's last token:
            # the place before it in the row may be the end of another completion.
            places = torch.arange(begin - 1, end)
            places[0] = prompt - 1
            reads[number, row, : len(completion)] = places + row * time
    return SharedRows(inputs, segments, targets.flatten(0, 1), reads.flatten(0, 1))
