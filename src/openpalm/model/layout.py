"""Rows that hold more than one sequence: where each token stands, and what it attends to.

A layout is passed to the model beside the ids; without one a row is a single sequence. Knows
tensors only: not what the sequences are, nor which of them carry a loss.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.model.attention import causal_attention
from openpalm.model.block import Attend


@dataclass(frozen=True)
class Layout:
    """positions: int64 [rows, time], each below time; attend: how the rows attend."""

    positions: Tensor
    attend: Attend


def packed(segments: Tensor) -> Layout:
    """Sequences one after the other in a row: each is computed as if it were alone.

    segments: int64 [rows, time]; neighbours with one number are one sequence. Positions begin
    at 0 in each. Sequences are taken out of their rows and attended to in groups of like length,
    so that attention costs the sum of their squares, not the square of the row.
    """
    rows, time = segments.shape
    begins, positions = _begins_and_within(segments)
    first = begins.flatten().nonzero()[:, 0]
    lengths = first.diff(append=first.new_tensor([rows * time]))
    groups = []
    for doubling in range(time.bit_length()):  # lengths of a group differ by less than two times
        among = (lengths >> doubling) == 1
        if among.any():
            offsets = torch.arange(int(lengths[among].max()), device=segments.device)
            inside = offsets < lengths[among, None]
            # Beyond its end a sequence is filled with its first token, which nothing attends to.
            groups.append((first[among, None] + offsets * inside, inside))
    taken = torch.cat([index[inside] for index, inside in groups])
    back = torch.empty_like(taken).scatter_(0, taken, torch.arange(len(taken), device=taken.device))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        done = []
        for index, inside in groups:
            parts = (_rows_at(x.flatten(0, 1), index) for x in (q, k, v))
            done.append(causal_attention(*parts)[inside])
        return torch.cat(done).index_select(0, back).view_as(q)

    return Layout(positions, attend)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    # index_select: its backward is an index_add, much cheaper than that of x[index].
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def _begins_and_within(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, whether a sequence begins with it, and how many of its own are before it."""
    here = torch.arange(segments.shape[1], device=segments.device)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return begins, here - (here * begins).cummax(dim=1).values


def shared(segments: Tensor) -> Layout:
    """Answers that share a prompt in one row: each is computed as if it alone followed it.

    segments: int64 [rows, time]; 0 is the prompt, at the row's beginning, and neighbours with one
    other number are an answer. Every answer's positions go on from the prompt's end.
    """
    prompt = (segments == 0).sum(dim=1, keepdim=True)
    _, within = _begins_and_within(segments)
    query, key = segments[:, :, None], segments[:, None]
    mask = ((key == 0) | (key == query)).tril()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, mask)

    return Layout(within + prompt * (segments != 0), attend)
