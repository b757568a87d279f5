"""The parallel transformer block, x + attention(norm(x)) + feedforward(norm(x)), and its norms.

PaLM, GPT-J and nanoPALM share it (nanoPALM's two norms per block become one in conversion).
`project_in` and `project_out` own the block's matrices under canonical names (q, kv, gate, up, out,
down); LoRA and quantized versions replace these two modules. Every module computes with the part of
its parameters that this process has, and `stream` exchanges activations with other processes.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.attention import causal_attention, masked_attention
from openpalm.model.cache import KVCache
from openpalm.model.config import ModelConfig
from openpalm.model.rotary import Rotary, RotaryTables
from openpalm.model.sharding import local_part, local_part_or_none

ATTENTION_INPUTS = ("q", "kv")
"""Outputs of project_in for attention; the others are for the feed-forward layer."""


class Norm(nn.Module):
    """Layer norm with a learned scale, and a bias if the config has biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim))
        self.bias = nn.Parameter(torch.empty(config.dim)) if config.bias else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local_part(self.weight), local_part_or_none(self.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class ResidualStream(nn.Module):
    """The residual stream between the blocks, held by one process.

    Tensor parallelism replaces this module: its processes share the projections of every block and,
    with sequence parallelism, also the positions of the residual stream [batch, time, dim].
    """

    def enter(self, n: Tensor, time: int) -> Tensor:
        """Input of a block's projections, at all `time` positions, from the normalised stream."""
        return n

    def leave(self, update: Tensor, dropout: float, training: bool) -> Tensor:
        """A block's update of the stream, with dropout, from its output projections.

        update: [batch, time, dim], or [n, dim] at selected positions.
        """
        return F.dropout(update, dropout, training)

    def part(self, x: Tensor) -> Tensor:
        """The part of x [batch, time, dim] that is added to the stream here."""
        return x

    def whole(self, x: Tensor, time: int) -> Tensor:
        """The stream at all `time` positions."""
        return x


class Projection(nn.Module):
    """Matrices and biases, of which this process may have a part."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, Callable[[Tensor], Tensor]] = {}
        """for a parameter by name: what to multiply by or add, if not this process's part"""

    def read(self, name: str) -> Tensor | None:
        parameter = getattr(self, name)
        return None if parameter is None else self.readers.get(name, local_part)(parameter)


class ProjectIn(Projection):
    """norm(x) [..., dim] -> queries, keys and values, and the inputs of the feed-forward layer.

    names: return only these outputs. One matrix multiply each: in training that avoids
    concatenating gradients, and every output is contiguous.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rows = {
            "q": config.heads * config.head_dim,
            "kv": 2 * config.kv_heads * config.head_dim,
        }
        if config.feedforward == "swiglu":
            self.rows["gate"] = config.ff_dim
        self.rows["up"] = config.ff_dim
        for name, rows in self.rows.items():
            setattr(self, name, nn.Parameter(torch.empty(rows, config.dim)))
        self.up_bias = nn.Parameter(torch.empty(config.ff_dim)) if config.bias else None

    def forward(self, n: Tensor, names: Sequence[str] = ()) -> tuple[Tensor, ...]:
        return tuple(self.multiply(n, name) for name in names or self.rows)

    def multiply(self, n: Tensor, name: str) -> Tensor:
        """Output of one matrix, [..., rows[name]]."""
        matrix = self.read(name)
        assert matrix is not None
        return F.linear(n, matrix, self.read("up_bias") if name == "up" else None)


class ProjectOut(Projection):
    """Sum of both output projections [..., dim], of heads [..., heads * head_dim] and hidden units
    [..., ff_dim]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.out = nn.Parameter(torch.empty(config.dim, config.heads * config.head_dim))
        self.down = nn.Parameter(torch.empty(config.dim, config.ff_dim))
        self.down_bias = nn.Parameter(torch.empty(config.dim)) if config.bias else None

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        out, down = self.read("out"), self.read("down")
        assert out is not None
        assert down is not None
        return F.linear(attended, out) + F.linear(hidden, down, self.read("down_bias"))


class Attend(Protocol):
    """Attention of one forward call over the right keys: its own, cached, or by a layout."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Splits heads, applies QK norm and rotary positions, and attends. Owns no matrix."""

    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        self.config = config
        self.rotate = rotary.rotate
        if config.qk_norm:
            self.q_scale = nn.Parameter(torch.empty(config.head_dim))
            self.k_scale = nn.Parameter(torch.empty(config.head_dim))

    def forward(
        self, layer: int, q: Tensor, kv: Tensor, tables: RotaryTables, attend: Attend
    ) -> Tensor:
        # As many heads as the projections returned, which may be a part of the config's.
        q = q.unflatten(-1, (-1, self.config.head_dim))
        k, v = kv.unflatten(-1, (2, -1, self.config.head_dim)).unbind(-3)
        if self.config.qk_norm:
            q = _rms_norm(q, local_part(self.q_scale))
            k = _rms_norm(k, local_part(self.k_scale))
        q, k = self.rotate(q, tables.query), self.rotate(k, tables.key)
        return attend(layer, q, k, v).flatten(-2)


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    # The tiny eps makes this the L2 norm of palm-rlhf-pytorch, up to a factor in `scale`.
    return F.rms_norm(x.float(), scale.shape, scale.float(), eps=1e-12).to(x.dtype)


class Block(nn.Module):
    """One parallel block (PaLM, section 2; GPT-J)."""

    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        self.dropout = config.dropout
        self.norm = Norm(config)
        self.stream = ResidualStream()
        self.project_in = ProjectIn(config)
        self.attention = Attention(config, rotary)
        self.project_out = ProjectOut(config)

    def forward(
        self,
        layer: int,
        x: Tensor,
        tables: RotaryTables,
        attend: Attend,
        selected: Tensor | None = None,
    ) -> Tensor:
        """x [batch, time, dim] -> [batch, time, dim], or [n, dim] at `selected`.

        selected: int64 [n], indices into the flattened positions of x.
        """
        time = tables.query[0].shape[-2]
        n = self.stream.enter(self.norm(x), time)
        if selected is None:
            q, kv, *ff = self.project_in(n)
            attended = self.attention(layer, q, kv, tables, attend)
        else:
            # The keys of all positions are needed, the feed-forward only at the selected ones.
            q, kv = self.project_in(n, ATTENTION_INPUTS)
            attended = self.attention(layer, q, kv, tables, attend)
            x = self.stream.whole(x, time)
            x, n, attended = (t.flatten(0, 1).index_select(0, selected) for t in (x, n, attended))
            ff = self.project_in(n, list(self.project_in.rows)[len(ATTENTION_INPUTS) :])
        update = self.project_out(attended, _activate(*ff))
        return x + self.stream.leave(update, self.dropout, self.training)


def _activate(*inputs: Tensor) -> Tensor:
    """SwiGLU of (gate, up), or GELU of (up,)."""
    if len(inputs) == 2:
        gate, up = inputs
        return F.silu(gate) * up
    return F.gelu(inputs[0], approximate="tanh")


def attend_uncached(causal: bool, mask: Tensor | None) -> Attend:
    """Attention within one input, without a cache; `mask` [batch, 1, keys] hides padding."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v) if causal else masked_attention(q, k, v, mask)

    return attend


def attend_cached(cache: KVCache, positions: Tensor) -> Attend:
    """Attention of new tokens over the cached tokens of their slot and over themselves."""
    empty = not any(cache.lengths)
    mask = None if empty else cache.mask(positions)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.write(layer, positions, k, v)
        if empty:  # nothing was cached before, so plain causal attention needs no mask
            return causal_attention(q, k, v)
        return masked_attention(q, keys, values, mask)

    return attend
