"""Fully sharded data parallelism (FSDP2; ZeRO-2 and ZeRO-3), also with replicas (HSDP).

Attached from outside: each block, and the rest of the model, gathers its weights when it computes
and keeps a part of them in between (Zhao et al. 2023; Rajbhandari et al. 2020, ZeRO).
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from openpalm.model.block import Block
from openpalm.model.transformer import Transformer
from openpalm.parallel.world import World


def data_mesh(world: World) -> DeviceMesh | None:
    """The mesh (replicas, shards) over which gradients are averaged; None for one process.

    Context-parallel processes hold the same weights and see other tokens, so they share in both.
    """
    if world.mesh is None or world.axes.averaged == 1:
        return None
    if world.axes.context == 1:
        return world.mesh["replicate", "shard"]
    world.mesh["shard", "context"]._flatten("shard_context")
    return world.mesh["replicate", "shard_context"]


def shard(model: Transformer, world: World, dtype: torch.dtype, *, reshard: bool) -> None:
    """Shards the model's parameters over the processes, in place; they may be on the meta device.

    dtype: of the arithmetic; weights stay in their own dtype and are gathered in this one, and
    gradients are summed in float32. Does nothing for one process.
    """
    mesh = data_mesh(world)
    if mesh is None:
        return
    if world.axes.replicate == 1:
        mesh = mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does that
    )
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:  # also those of a critic's own trunk
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def reduce_over_replicas(model: nn.Module, on: bool, *, recurse: bool = True) -> None:
    """Whether the next backward pass sums gradients over replicas: only the last of a step must."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(on, recurse=recurse)
