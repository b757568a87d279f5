"""Key and value heads of tensor-parallel processes: each computes those of its own query heads.

One key head is computed by every process. Several are shared by heads where the processes divide
their number. The matrix `kv` has all keys before all values, so a process's rows of it are not its
heads: before the multiplication the processes exchange rows. Otherwise every process has the whole
matrix and takes the rows of its heads.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from openpalm.model.block import Block
from openpalm.model.config import ModelConfig
from openpalm.model.sharding import local_part
from openpalm.parallel.collectives import Group


def shared_by_heads(config: ModelConfig, processes: int) -> bool:
    """Whether each process has its own heads of the keys and values."""
    return config.kv_heads > 1 and config.kv_heads % processes == 0


def own_key_heads(config: ModelConfig, group: Group) -> int:
    """Number of key heads of this process."""
    if shared_by_heads(config, group.size()):
        return config.kv_heads // group.size()
    return len(_heads_used(config, group.rank(), group.size()))


def read_own_keys(block: Block, config: ModelConfig, group: Group) -> None:
    """Makes the block's projections compute only the keys and values of this process's queries."""
    if shared_by_heads(config, group.size()):
        block.project_in.readers["kv"] = partial(_exchanged, group=group)
        return
    heads = _heads_used(config, group.rank(), group.size())
    block.project_in.readers["kv"] = partial(_rows, heads=heads, head_dim=config.head_dim)
    for name, factors in getattr(block.project_in, "lora", {}).items():
        if name in ("k", "v"):
            factors.readers["b"] = partial(_rows, heads=heads, head_dim=config.head_dim, parts=1)


def _heads_used(config: ModelConfig, rank: int, processes: int) -> list[int]:
    """Key heads of a process: one for an equal number of its query heads each, in order."""
    groups, own = config.heads // config.kv_heads, config.heads // processes
    used = [head // groups for head in range(rank * own, (rank + 1) * own)]
    single = sorted(set(used))
    share, rest = divmod(own, len(single))
    even = not rest and used == [head for head in single for _ in range(share)]
    return single if even else used


def _rows(matrix: Tensor, heads: list[int], head_dim: int, parts: int = 2) -> Tensor:
    """Rows of the heads; keys come before values if there are two parts."""
    local = local_part(matrix)
    index = torch.tensor(heads, device=local.device)
    by_head = local.unflatten(0, (parts, -1, head_dim))
    return by_head.index_select(1, index).flatten(0, 2)


def _exchanged(matrix: Tensor, group: Group) -> Tensor:
    """Keys and values of this process's heads, from each process's rows of the whole matrix."""
    return _Exchange.apply(local_part(matrix), group)


class _Exchange(torch.autograd.Function):
    """Of n processes, process p has the halves 2p and 2p + 1 of 2n equal parts of the matrix.

    It needs part p, its keys, and part n + p, its values: part j goes to process j % n.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rank, ctx.size = group, group.rank(), group.size()
        halves = rows.chunk(2)
        to = [(2 * ctx.rank + half) % ctx.size for half in (0, 1)]
        came_from = [ctx.rank // 2, (ctx.size + ctx.rank) // 2]
        ctx.to, ctx.came_from = to, came_from
        return _sent(halves, to, came_from, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sent(grad_outputs[0].chunk(2), ctx.came_from, ctx.to, ctx.group), None


def _sent(halves: tuple[Tensor, ...], to: list[int], came_from: list[int], group: Group) -> Tensor:
    """Sends the halves; returns those that come from two processes, in this order."""
    counts_out, counts_in = (
        [where.count(n) for n in range(group.size())] for where in (to, came_from)
    )
    rows = len(halves[0])
    ordered = torch.cat(
        [half for _, half in sorted(zip(to, halves, strict=True), key=lambda x: x[0])]
    )
    found = torch.empty_like(ordered)
    dist.all_to_all_single(
        found, ordered, [n * rows for n in counts_in], [n * rows for n in counts_out], group=group
    )
    if came_from[0] > came_from[1]:
        found = torch.cat(found.chunk(2)[::-1])
    return found
