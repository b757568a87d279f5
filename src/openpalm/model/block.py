"""The parallel block: x + attention(norm(x)) + feedforward(norm(x)), for both families.

`project_in` and `project_out` are the seam: they own the block's matrices under canonical names
(q, kv, gate, up, out, down), and fused, packed, sharded or adapted versions can take their place
without the block, attention or rotary knowing. `ProjectHead` is the same seam for the vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.attention import causal_attention, masked_attention
from openpalm.model.cache import KVCache
from openpalm.model.config import ModelConfig
from openpalm.model.cross_entropy import linear_cross_entropy
from openpalm.model.rotary import Rotary, RotaryTables

ATTENDS = ("q", "kv")
"""The parts that attention reads; the feed-forward reads the others."""


class Norm(nn.Module):
    """Layer norm with a learned scale, and a bias only where the config asks for one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.dim))
        self.bias = nn.Parameter(torch.empty(config.dim)) if config.bias else None
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ProjectIn(nn.Module):
    """norm(x) [..., dim] -> queries, keys and values, and the feed-forward's input parts.

    With `names`, only those parts. A matrix multiply each: no gradients to put together, and
    every part contiguous.
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
        """[..., rows of the named part]"""
        return F.linear(n, getattr(self, name), self.up_bias if name == "up" else None)


class ProjectOut(nn.Module):
    """Heads [..., heads * head_dim] and hidden units [..., ff_dim] -> their sum in [..., dim]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.out = nn.Parameter(torch.empty(config.dim, config.heads * config.head_dim))
        self.down = nn.Parameter(torch.empty(config.dim, config.ff_dim))
        self.down_bias = nn.Parameter(torch.empty(config.dim)) if config.bias else None

    def forward(self, attended: Tensor, hidden: Tensor) -> Tensor:
        return F.linear(attended, self.out) + F.linear(hidden, self.down, self.down_bias)


class ProjectHead(nn.Module):
    """States [..., dim] -> logits [..., rows of the table]; the table is the model's own."""

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(states, table, bias)

    def cross_entropy(
        self,
        states: Tensor,
        table: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        z_loss: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Of these logits, summed: see linear_cross_entropy."""
        return linear_cross_entropy(states, table, bias, targets, z_loss=z_loss, chunk=chunk)


class Attend(Protocol):
    """Where the keys of this call come from; one per forward, shared by all blocks."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Splits heads, normalises and rotates queries and keys, attends. Owns no matrix."""

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
        q = q.unflatten(-1, (self.config.heads, -1))
        k, v = kv.unflatten(-1, (2, self.config.kv_heads, -1)).unbind(-3)
        if self.config.qk_norm:
            q, k = _rms_norm(q, self.q_scale), _rms_norm(k, self.k_scale)
        q, k = self.rotate(q, tables.query), self.rotate(k, tables.key)
        return attend(layer, q, k, v).flatten(-2)


def _rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    # The tiny eps makes this exactly the L2 norm of older checkpoints, up to a factor in `scale`.
    return F.rms_norm(x.float(), scale.shape, scale.float(), eps=1e-12).to(x.dtype)


class Block(nn.Module):
    """One parallel block (PaLM, section 2; GPT-J)."""

    def __init__(self, config: ModelConfig, rotary: Rotary):
        super().__init__()
        self.dropout = config.dropout
        self.norm = Norm(config)
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
        """x [batch, time, dim] to the same, or at `selected` [n] of it, flattened, to [n, dim]."""
        n = self.norm(x)
        if selected is None:
            q, kv, *ff = self.project_in(n)
            attended = self.attention(layer, q, kv, tables, attend)
        else:
            q, kv = self.project_in(n, ATTENDS)
            attended = self.attention(layer, q, kv, tables, attend)
            x, n, attended = (t.flatten(0, 1).index_select(0, selected) for t in (x, n, attended))
            ff = self.project_in(n, list(self.project_in.rows)[len(ATTENDS) :])
        update = self.project_out(attended, _activate(*ff))
        return x + F.dropout(update, self.dropout, self.training)


def _activate(*parts: Tensor) -> Tensor:
    """SwiGLU of (gate, up), or GELU of (up,)."""
    if len(parts) == 2:
        gate, up = parts
        return F.silu(gate) * up
    return F.gelu(parts[0], approximate="tanh")


def attend_whole(causal: bool, mask: Tensor | None) -> Attend:
    """Attention inside one uncached input; `mask` [batch, 1, keys] hides padding."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v) if causal else masked_attention(q, k, v, mask)

    return attend


def attend_cached(cache: KVCache, positions: Tensor) -> Attend:
    """Attention of new tokens over all that their slots of the cache hold, and themselves."""
    empty = not any(cache.lengths)
    mask = None if empty else cache.mask(positions)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.write(layer, positions, k, v)
        if empty:  # the new tokens are all there is: no mask to build
            return causal_attention(q, k, v)
        return masked_attention(q, keys, values, mask)

    return attend
