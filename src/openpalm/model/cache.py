"""The KV cache: keys and values of earlier tokens, passed to the model's forward.

One slot per sequence, each with its own length, so that sequences of different lengths share a
batch.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.model.config import ModelConfig


class KVCache:
    """Keys and values of up to `length` tokens in each of `slots` sequences.

    keys, values: [depth, slots, length, kv_heads, head_dim]; lengths: tokens stored, [slots].
    kv_heads: those of this process, `Transformer.kv_heads`; None: all of the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int,
        length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_heads: int | None = None,
    ):
        shape = (config.depth, slots, length, kv_heads or config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * slots

    @property
    def capacity(self) -> int:
        """Tokens that a slot can store."""
        return self.keys.shape[2]

    def positions(self, time: int) -> Tensor:
        """Positions of the next `time` tokens of each slot: [slots, time]."""
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(time, device=self.keys.device)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [slots, time, kv_heads, head_dim] at `positions`.

        Returns all stored keys and values of the layer, [slots, longest, kv_heads, head_dim].
        """
        end = max(self.lengths) + k.shape[1]
        if end > self.capacity:
            raise AssertionError(f"{end} tokens do not fit a cache of {self.capacity}")
        start = self.lengths[0]
        # With equal lengths one slice serves, which is much cheaper than a scatter.
        if self.lengths == [start] * len(self.lengths):
            self.keys[layer, :, start:end] = k
            self.values[layer, :, start:end] = v
        else:
            slot = torch.arange(len(self.lengths), device=positions.device)[:, None]
            self.keys[layer, slot, positions] = k.to(self.keys.dtype)
            self.values[layer, slot, positions] = v.to(self.values.dtype)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def mask(self, positions: Tensor) -> Tensor | None:
        """The causal mask over stored keys, [slots, time, keys]; None if nothing is masked."""
        end = max(self.lengths) + positions.shape[1]
        if positions.shape[1] == 1 and min(self.lengths) == max(self.lengths):
            return None
        return torch.arange(end, device=positions.device) <= positions[:, :, None]

    def advance(self, counts: list[int]) -> None:
        """Slot i now stores counts[i] more tokens; anything written after them is padding."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def span(self, first: int, last: int) -> "KVCache":
        """Slots first .. last - 1 as a cache over the same memory.

        Its lengths are a copy, so the caller must write them back after the span advances.
        """
        span = copy.copy(self)
        span.keys, span.values = self.keys[:, first:last], self.values[:, first:last]
        span.lengths = self.lengths[first:last]
        return span

    def copy_slot(self, source: int, target: int, count: int) -> None:
        """Replaces slot `target` by the first `count` tokens of slot `source`."""
        for stored in (self.keys, self.values):
            stored[:, target, :count] = stored[:, source, :count]
        self.lengths[target] = count

    def swap(self, a: int, b: int) -> None:
        """Exchanges two slots."""
        if a == b:
            return
        end = max(self.lengths[a], self.lengths[b])
        for stored in (self.keys, self.values):
            stored[:, [a, b], :end] = stored[:, [b, a], :end]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def grow(self, length: int) -> None:
        """Raises the capacity to `length` tokens per slot; stored tokens stay."""
        if length > self.capacity:
            more = (0, 0, 0, 0, 0, length - self.capacity)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
