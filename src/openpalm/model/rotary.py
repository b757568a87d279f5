"""Positions as rotations of queries and keys (RoFormer), with xPos's decay on request.

Angles and scales are computed and applied in float32 whatever the model's dtype.
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
    """Makes the tables once, as long as the longest input so far, and looks positions up."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self._tables: Tensor | None = None  # [4, positions, rotated dims]; no parameter, no buffer

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
        turn = _plainly if torch.compiler.is_compiling() else _Rotation.apply
        turned = turn(x[..., :rotated], cos, sin, self.config.rotary == "halves")
        return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)


class _Rotation(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair; four passes over x each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.halves = halves
        wide = x.to(cos.dtype)
        turned = wide * cos
        (a, b), (sin_a, sin_b), (to_a, to_b) = (_pairs(t, halves) for t in (wide, sin, turned))
        to_a.addcmul_(b, sin_a, value=-1)
        to_b.addcmul_(a, sin_b)
        return turned.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        wide = grad.to(cos.dtype)
        turned = wide * cos
        (a, b), (sin_a, sin_b), (to_a, to_b) = (_pairs(t, ctx.halves) for t in (wide, sin, turned))
        to_a.addcmul_(b, sin_b)
        to_b.addcmul_(a, sin_a, value=-1)
        return turned.to(grad.dtype), None, None, None


def _plainly(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """_Rotation by operations that a compiler fuses by itself; more passes without one."""
    a, b = _pairs(x, halves)
    crossed = torch.cat([-b, a], -1) if halves else torch.stack([-b, a], -1).flatten(-2)
    return (x * cos + crossed * sin).to(x.dtype)


def _pairs(x: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """Views of the coordinates that are rotated together: first and second half, or neighbours."""
    first, second = x.chunk(2, dim=-1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    return first, second


def _rounded(longest: int, config: ModelConfig) -> int:
    """Positions to make at once: a power of two, where xPos can reach that far."""
    length = max(256, 1 << (longest - 1).bit_length())
    return max(longest, min(length, xpos_reach(config))) if config.xpos_base else length


def xpos_reach(config: ModelConfig) -> int:
    """Tokens whose xPos powers stay within float32."""
    per_base = _MAX_LOG_SCALE / -math.log(0.4 / 1.4)
    return int(per_base * config.xpos_base) + config.context // 2


def _tables(config: ModelConfig, length: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device, dtype=torch.float64)
    angle = position[:, None] * _frequencies(config, device)
    cos, sin = angle.cos(), angle.sin()
    scale = _xpos_scale(config, position)
    return torch.stack([cos * scale, sin * scale, cos / scale, sin / scale]).float()


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position for each rotated coordinate: base^(-2j / dims) for pair j."""
    dims = config.rotated
    pair = torch.arange(dims // 2, device=device, dtype=torch.float64)
    # nanoPALM steps its exponent by (4j + 1) and keeps it in halves while it pairs neighbours.
    exponent = (4 * pair + 1) / dims if config.rotary == "nanopalm" else 2 * pair / dims
    frequency = config.rotary_base**-exponent
    if config.rotary == "interleaved":
        return frequency.repeat_interleave(2)
    return frequency.repeat(2)


def _xpos_scale(config: ModelConfig, position: Tensor) -> Tensor:
    """xPos (Sun et al. 2022, section 3): s_i^((p - centre) / base), [positions, rotated dims].

    Only differences of positions reach a score, so any fixed centre gives the same model; the
    middle of the training context keeps the powers small. Raises SettingsError where a power
    would leave float32.
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
