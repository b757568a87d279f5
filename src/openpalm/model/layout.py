"""Layouts of rows with several sequences: sequence packing with a document mask, shared prompts.

A layout gives the positions and the attention of each token, and is passed to the model with the
ids. Without a layout a row is one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.model.attention import causal_attention
from openpalm.model.block import Attend


@dataclass(frozen=True)
class Layout:
    """Positions and attention of the tokens of rows [rows, time]."""

    positions: Tensor
    """int64 [rows, time], or [time] if they are the same in all rows"""
    attend: Attend
    longest: int | None = None
    """a number above every position; None: the rows' time"""


def packed_layout(segments: Tensor) -> Layout:
    """Packed sequences in a row, each computed as if it were alone.

    segments: int64 [rows, time]; neighbouring tokens with the same number are one sequence.
    Positions restart at 0 in each sequence. Attention gathers the sequences in groups of similar
    length, so that it costs the sum of their squared lengths, not the squared length of the row.
    """
    rows, time = segments.shape
    begins, positions = begins_and_positions(segments)
    first = begins.flatten().nonzero()[:, 0]
    lengths = first.diff(append=first.new_tensor([rows * time]))
    groups = [SequenceGroup(*found, found[0]) for found in groups_by_length(first, lengths)]
    return Layout(positions, attend_groups(groups))


class SequenceGroup(NamedTuple):
    """Sequences that one attention call computes, as indices into flattened rows.

    There may be more keys than queries: the first ones precede the queries, in each sequence.
    """

    queries: Tensor
    """int64 [sequences, longest]; a shorter one is filled up with any index"""
    inside: Tensor
    """bool [sequences, longest]: which of them are not filling"""
    keys: Tensor
    """int64 [sequences, longest with the earlier keys]"""


def groups_by_length(first: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Indices of tokens and which of them are no filling, for groups of similar length.

    first, lengths: int64 [sequences]. Lengths of a group differ by less than two times, so padding
    less than doubles the rows, and the number of groups is at most log2(longest) + 1.
    """
    groups = []
    for doubling in range(int(lengths.max()).bit_length() if len(lengths) else 0):
        in_group = (lengths >> doubling) == 1
        if in_group.any():
            groups.append(_gather_index(first[in_group], lengths[in_group]))
    return groups


def attend_groups(groups: Sequence[SequenceGroup]) -> Attend:
    """Causal attention within each sequence; the queries of the groups are all queries, once."""
    # Without the filling: a filling index repeats a token that another place computes.
    order = torch.cat([group.queries[group.inside] for group in groups])
    # The inverse permutation: brings the tokens of the groups back to their place in the rows.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        attended = []
        for queries, inside, keys in groups:
            indices = (queries, keys, keys)
            sequences = (_gather(x, index) for x, index in zip(flat, indices, strict=True))
            attended.append(causal_attention(*sequences)[inside])
        return torch.cat(attended).index_select(0, back).view_as(q)

    return attend


def _gather(x: Tensor, index: Tensor) -> Tensor:
    # The backward pass of index_select is an index_add, much cheaper than that of x[index].
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def begins_and_positions(segments: Tensor) -> tuple[Tensor, Tensor]:
    """For each token, whether it is the first of its sequence, and its position within it."""
    here = torch.arange(segments.shape[1], device=segments.device)
    # The start of a token's sequence is the running maximum of the begins' indices.
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return begins, here - (here * begins).cummax(dim=1).values


def shared_prompt_layout(segments: Tensor) -> Layout:
    """Several completions of one prompt in a row, each computed as if it followed the prompt alone.

    segments: int64 [rows, time]; 0 is the prompt, at the beginning of the row; neighbouring tokens
    with the same number above 0 are a completion; -1 is padding. Positions of every completion
    continue those of the prompt. The prompt is computed once, and its keys come before the keys of
    each completion.
    """
    rows, time = segments.shape
    prompt_lengths = (segments == 0).sum(dim=1)
    begins, within = begins_and_positions(segments)
    begin = begins.flatten().nonzero()[:, 0]
    is_completion = segments.flatten()[begin] > 0
    first = begin[is_completion]
    lengths = begin.diff(append=begin.new_tensor([rows * time]))[is_completion]
    # Indices into the flattened rows: [rows, longest prompt] and [completions, longest completion].
    row_starts = torch.arange(rows, device=first.device) * time
    prompts, in_prompt = _gather_index(row_starts, prompt_lengths)
    completions, in_completion = _gather_index(first, lengths)
    row = first // time
    keys = torch.cat([prompts[row], completions], dim=1)
    # A completion sees its whole prompt, without the padding of shorter prompts, and itself.
    longest = completions.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=first.device).tril()
    on_prompt = in_prompt[row, None].expand(-1, longest, -1)
    mask = torch.cat([on_prompt, causal.expand(len(first), -1, -1)], dim=2)
    # Outputs that are tokens, not the filling of short sequences, and their places in the rows.
    real = torch.cat([in_prompt.flatten(), in_completion.flatten()]).nonzero()[:, 0]
    places = torch.cat([prompts.flatten(), completions.flatten()])[real]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        on_prompts = causal_attention(*(_gather(x, prompts) for x in flat))
        key, value = (_gather(x, keys) for x in flat[1:])
        on_completions = causal_attention(_gather(flat[0], completions), key, value, mask)
        attended = torch.cat([x.flatten(0, 1) for x in (on_prompts, on_completions)])
        attended = attended.index_select(0, real)
        # Padding attends to nothing and gets zeros.
        return torch.zeros_like(flat[0]).index_copy(0, places, attended).view_as(q)

    return Layout(within + prompt_lengths[:, None] * (segments > 0), attend)


def _gather_index(first: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the tokens of sequences [n, longest], and which of them are inside, bool.

    first: index of each sequence's first token; it also fills the places after a shorter end.
    """
    offsets = torch.arange(int(lengths.max()), device=first.device)
    inside = offsets < lengths[:, None]
    return first[:, None] + offsets * inside, inside
