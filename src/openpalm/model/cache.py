"""The keys and values of tokens already read, passed to forward.

One slot a sequence, each with its own length, so sequences of different lengths share a batch.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.model.config import ModelConfig


class KVCache:
    """Room for `length` tokens in each of `slots` sequences.

    keys, values: [depth, slots, length, kv_heads, head_dim]; lengths: tokens held, [slots].
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.depth, slots, length, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * slots

    @property
    def room(self) -> int:
        """Tokens a slot can hold."""
        return self.keys.shape[2]

    def positions(self, time: int) -> Tensor:
        """Where the next `time` tokens of each slot go: [slots, time]."""
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(time, device=self.keys.device)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [slots, time, kv_heads, head_dim]; returns the keys and values held."""
        end = max(self.lengths) + k.shape[1]
        if end > self.room:
            raise AssertionError(f"{end} tokens do not fit a cache of {self.room}")
        start = self.lengths[0]
        if self.lengths == [start] * len(self.lengths):  # one slice: much cheaper than a scatter
            self.keys[layer, :, start:end] = k
            self.values[layer, :, start:end] = v
        else:
            slot = torch.arange(len(self.lengths), device=positions.device)[:, None]
            self.keys[layer, slot, positions] = k.to(self.keys.dtype)
            self.values[layer, slot, positions] = v.to(self.values.dtype)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def mask(self, positions: Tensor) -> Tensor | None:
        """Keys each position may attend to, [slots, time, keys]; None where that is all of them."""
        end = max(self.lengths) + positions.shape[1]
        if positions.shape[1] == 1 and min(self.lengths) == max(self.lengths):
            return None
        return torch.arange(end, device=positions.device) <= positions[:, :, None]

    def advance(self, counts: list[int]) -> None:
        """Slot i now holds counts[i] more tokens; what was written beyond is padding."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def span(self, first: int, last: int) -> "KVCache":
        """Slots first .. last - 1 as a cache of their own over the same memory.

        Its lengths are a copy: whoever advances it writes them back.
        """
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, first:last], self.values[:, first:last]
        part.lengths = self.lengths[first:last]
        return part

    def copy_slot(self, source: int, target: int, count: int) -> None:
        """Slot `target` then holds the first `count` tokens of slot `source`."""
        for kept in (self.keys, self.values):
            kept[:, target, :count] = kept[:, source, :count]
        self.lengths[target] = count

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        if a == b:
            return
        end = max(self.lengths[a], self.lengths[b])
        for kept in (self.keys, self.values):
            kept[:, [a, b], :end] = kept[:, [b, a], :end]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def grow(self, length: int) -> None:
        """Makes room for `length` tokens a slot; what is held stays."""
        if length > self.room:
            more = (0, 0, 0, 0, 0, length - self.room)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
