"""Rotary position embeddings (RoPE, RoFormer) and xPos (Sun et al. 2022), with nanoPALM's variant.

Rotates queries and keys by position. Tables are computed in float64 and applied in float32,
whatever the model's dtype.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from openpalm.errors import SettingsError
from openpalm.model.config import ModelConfig

_MAX_LOG_SCALE = 80.0  # exp(80) and exp(-80) are still normal float32 numbers


class RotaryTables:
    """cos and sin for the queries and for the keys, each [..., time, rotated dims], float32."""

    def __init__(self, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]):
        self.query = query
        self.key = key


class Rotary(nn.Module):
    """Looks up positions in tables that grow with the longest input so far."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # [4, positions, rotated dims]. No buffer, because model.to(bfloat16) would round it.
        self._tables: Tensor | None = None

    def forward(self, positions: Tensor, longest: int) -> RotaryTables:
        """Tables for integer `positions` [time] or [batch, time], all below `longest`."""
        tables = self._tables
        if tables is None or tables.shape[1] < longest or tables.device != positions.device:
            length = _rounded(longest, self.config)
            tables = self._tables = _tables(self.config, length, positions.device)
        query_cos, query_sin, key_cos, key_sin = tables[:, positions].unbind(0)
        return RotaryTables((query_cos, query_sin), (key_cos, key_sin))

    def rotate(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """Rotates the first coordinates of `x` [batch, time, heads, head_dim]; keeps its dtype."""
        cos, sin = (t.unsqueeze(-2) for t in table)
        rotated = self.config.rotated
        # torch 2.11 compiles _Rotation's writes into views wrongly: float32 gradients on a GPU.
        apply = _rotate_compiled if torch.compiler.is_compiling() else _Rotation.apply
        first = apply(x[..., :rotated], cos, sin, self.config.rotary == "halves")
        return first if rotated == x.shape[-1] else torch.cat([first, x[..., rotated:]], dim=-1)


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of coordinates.

    Written by hand, so that it makes four passes over x in each direction. The gradient is the
    rotation by the negative angle.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.halves = halves
        wide = x.to(cos.dtype)
        rotated = wide * cos
        (a, b), (sin_a, sin_b), (to_a, to_b) = (_pairs(t, halves) for t in (wide, sin, rotated))
        to_a.addcmul_(b, sin_a, value=-1)
        to_b.addcmul_(a, sin_b)
        return rotated.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        wide = grad.to(cos.dtype)
        rotated = wide * cos
        (a, b), (sin_a, sin_b), (to_a, to_b) = (_pairs(t, ctx.halves) for t in (wide, sin, rotated))
        to_a.addcmul_(b, sin_b)
        to_b.addcmul_(a, sin_a, value=-1)
        return rotated.to(grad.dtype), None, None, None


def _rotate_compiled(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """_Rotation in operations that torch.compile fuses; slower without it."""
    a, b = _pairs(x, halves)
    crossed = torch.cat([-b, a], -1) if halves else torch.stack([-b, a], -1).flatten(-2)
    return (x * cos + crossed * sin).to(x.dtype)


def _pairs(x: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Views of the two coordinates of each pair: first and second half, or neighbours."""
    first, second = x.chunk(2, dim=-1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


def _rounded(longest: int, config: ModelConfig) -> int:
    """Length of the tables: the next power of two, limited to what xPos can compute."""
    length = max(256, 1 << (longest - 1).bit_length())
    return max(longest, min(length, xpos_reach(config))) if config.xpos_base else length


def xpos_reach(config: ModelConfig) -> int:
    """The longest input, in tokens, with xPos scales that fit float32."""
    per_base = _MAX_LOG_SCALE / -math.log(0.4 / 1.4)  # the first pair has the largest scale
    return int(per_base * config.xpos_base) + config.context // 2


def _tables(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    """cos and sin of queries, then of keys: [4, length, rotated dims].

    xPos multiplies queries by its scale and divides keys by it, so that a score keeps the scale of
    the distance only.
    """
    position = torch.arange(length, device=device, dtype=torch.float64)
    angle = position[:, None] * _frequencies(config, device)
    cos, sin = angle.cos(), angle.sin()
    scale = _xpos_scale(config, position)
    return torch.stack([cos * scale, sin * scale, cos / scale, sin / scale]).float()


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position for each rotated coordinate: base^(-2j / dims) for pair j."""
    dims = config.rotated
    pair = torch.arange(dims // 2, device=device, dtype=torch.float64)
    # nanoPALM uses exponents 4j + 1 and frequencies in halves, but rotates neighbouring pairs, so
    # the two coordinates of a pair turn by different angles.
    exponent = (4 * pair + 1) / dims if config.rotary == "nanopalm" else 2 * pair / dims
    frequency = config.rotary_base**-exponent
    if config.rotary == "interleaved":
        return frequency.repeat_interleave(2)
    return frequency.repeat(2)


def _xpos_scale(config: ModelConfig, position: Tensor) -> Tensor:
    """xPos (Sun et al. 2022, section 3): s_i^((p - centre) / base), [positions, rotated dims].

    Scores depend on differences of positions only, so any fixed centre gives the same model. The
    middle of the training context keeps the powers small. Raises SettingsError if a power does not
    fit float32.
    """
    if not config.xpos_base:
        return torch.ones(1, 1, device=position.device, dtype=torch.float64)
    dims = config.rotated
    pair = torch.arange(0, dims, 2, device=position.device, dtype=torch.float64)
    log_scale = ((pair + 0.4 * dims) / (1.4 * dims)).log()
    power = (position - config.context // 2) / config.xpos_base
    largest = power.abs().max().item() * -log_scale[0].item()
    if largest > _MAX_LOG_SCALE:
        raise SettingsError(
            f"{len(position)} tokens are too many for xPos with base {config.xpos_base:g}: its "
            f"powers leave float32; stay below {xpos_reach(config)} tokens, or train with a "
            "larger context"
        )
    return (power[:, None] * log_scale).exp().repeat(1, 2)
