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


def packed_layout(segments: Tensor) -> Layout:
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
            groups.append(_taken(first[among], lengths[among]))
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


def shared_prompt_layout(segments: Tensor) -> Layout:
    """Answers that share a prompt in one row: each is computed as if it alone followed it.

    segments: int64 [rows, time]; 0 is the prompt, at the row's beginning, neighbours with one
    number above 0 are an answer, -1 is padding. Every answer's positions go on from the prompt's
    end. Answers are taken out of their rows with the prompt as more keys, so that none is scored
    against another.
    """
    rows, time = segments.shape
    prompts = (segments == 0).sum(dim=1)
    begins, within = _begins_and_within(segments)
    begin = begins.flatten().nonzero()[:, 0]
    answers = segments.flatten()[begin] > 0
    first, lengths = begin[answers], begin.diff(append=begin.new_tensor([rows * time]))[answers]
    of_rows, in_prompt = _taken(torch.arange(rows, device=first.device) * time, prompts)
    own, inside = _taken(first, lengths)
    row = first // time
    keys = torch.cat([of_rows[row], own], dim=1)
    earlier = torch.ones(own.shape[1], own.shape[1], dtype=torch.bool, device=first.device).tril()
    before = in_prompt[row, None].expand(-1, len(earlier), -1)
    mask = torch.cat([before, earlier.expand(len(first), -1, -1)], dim=2)
    kept = torch.cat([in_prompt.flatten(), inside.flatten()]).nonzero()[:, 0]
    places = torch.cat([of_rows.flatten(), own.flatten()])[kept]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        of_prompts = causal_attention(*(_rows_at(x, of_rows) for x in flat))
        key, value = (_rows_at(x, keys) for x in flat[1:])
        answering = causal_attention(_rows_at(flat[0], own), key, value, mask)
        done = torch.cat([x.flatten(0, 1) for x in (of_prompts, answering)]).index_select(0, kept)
        return torch.zeros_like(flat[0]).index_copy(0, places, done).view_as(q)

    return Layout(within + prompts[:, None] * (segments > 0), attend)


def _taken(first: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Where sequences' tokens are, as rows of one width, and which of these are inside.

    Beyond its end a sequence is filled with its first token.
    """
    offsets = torch.arange(int(lengths.max()), device=first.device)
    inside = offsets < lengths[:, None]
    return first[:, None] + offsets * inside, inside
