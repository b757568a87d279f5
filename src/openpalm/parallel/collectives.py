"""Collectives with gradients, between the processes of a group: sums, gathers, parts of a tensor.

    summed      forward all-reduce        backward identity          Megatron-LM's g
    shared      forward identity          backward all-reduce        Megatron-LM's f
    gathered    forward all-gather        backward reduce-scatter
    joined      forward all-gather        backward own part
    scattered   forward reduce-scatter    backward all-gather

A dimension of n is cut as torch.chunk cuts it: parts of ceil(n / processes), the last ones shorter
or empty.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openpalm.model.sharding import chunk_span

Group = dist.ProcessGroup
# torch 2.13 renamed both; there the old names print a warning.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over processes, on each of them; all processes must have the same gradient of it."""
    return _Summed.apply(x, group)


def shared(x: Tensor, group: Group) -> Tensor:
    """x, equal on all processes, for different uses: its gradient is summed over processes."""
    return _Shared.apply(x, group)


def gathered(x: Tensor, size: int, dim: int, group: Group) -> Tensor:
    """The whole dimension of `size`, from its parts x, for different uses: gradients are summed."""
    return _Gathered.apply(x, size, dim, group)


def joined(x: Tensor, size: int, dim: int, group: Group) -> Tensor:
    """The whole dimension of `size`, from its parts x; all must have the same gradient of it."""
    return _Joined.apply(x, size, dim, group)


def scattered(x: Tensor, dim: int, group: Group) -> Tensor:
    """This process's part of the sum over processes."""
    return _Scattered.apply(x, dim, group)


def span(size: int, group: Group) -> tuple[int, int]:
    """This process's part of a dimension of `size`: start and length."""
    return chunk_span(size, group.size(), group.rank())


def largest_part(size: int, group: Group) -> int:
    """Length of the first process's part, which none exceeds."""
    return -(-size // group.size())


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_outputs[0], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _all_reduce(grad_outputs[0], ctx.group), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, size, dim, group)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(grad_outputs[0], ctx.dim, ctx.group), None, None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.span = dim, span(size, group)
        return _all_gather(x, size, dim, group)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return grad_outputs[0].narrow(ctx.dim, *ctx.span), None, None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.size, ctx.dim, ctx.group = x.shape[dim], dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        return _all_gather(grad_outputs[0], ctx.size, ctx.dim, ctx.group), None, None


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, size: int, dim: int, group: Group) -> Tensor:
    # Parts must have one length and follow each other in memory: the dimension comes first.
    part = _padded(x.movedim(dim, 0), largest_part(size, group))
    found = part.new_empty(len(part) * group.size(), *part.shape[1:])
    all_gather_single(found, part, group=group)
    return found[:size].movedim(0, dim).contiguous()


def _reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    size, part = x.shape[dim], largest_part(x.shape[dim], group)
    whole = _padded(x.movedim(dim, 0), part * group.size())
    found = whole.new_empty(part, *whole.shape[1:])
    _reduce_scatter_single(found, whole, group=group)
    return found[: span(size, group)[1]].movedim(0, dim).contiguous()


def _padded(x: Tensor, length: int) -> Tensor:
    """x in one block of memory, with zeros up to `length` in its first dimension."""
    if len(x) < length:
        x = F.pad(x, [0, 0] * (x.dim() - 1) + [0, length - len(x)])
    return x.contiguous()
