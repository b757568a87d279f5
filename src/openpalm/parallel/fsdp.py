"""Fully sharded data parallelism (FSDP2; ZeRO-2 and ZeRO-3), also with replicas (HSDP).

Attached from outside: each block, and the rest of the model, gathers its weights when it computes
and keeps a part of them in between (Zhao et al. 2023; Rajbhandari et al. 2020, ZeRO).
"""

import warnings

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
    """The mesh over which gradients are averaged, (shards) or (replicas, shards); None for one
    process.

    Context-parallel processes hold the same weights and see other tokens, so they share in both.
    """
    if world.mesh is None or world.axes.averaged == 1:
        return None
    axis, mesh = "shard", world.mesh["shard"]
    if world.axes.context > 1:
        axis = "shard_context"
        mesh = world.mesh["shard", "context"]._flatten(axis)
    if world.axes.replicate == 1:
        return mesh
    with warnings.catch_warnings():
        # torch warns about slices with a flattened axis, and has no other public way to make one.
        warnings.simplefilter("ignore", UserWarning)
        return world.mesh["replicate", axis]


def shard(model: Transformer, world: World, dtype: torch.dtype, *, reshard: bool) -> None:
    """Shards the model's parameters over the processes, in place; they may be on the meta device.

    dtype: of the arithmetic; weights stay in their own dtype and are gathered in this one, and
    gradients are summed in float32. Does nothing for one process.
    """
    mesh = data_mesh(world)
    if mesh is None:
        return
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
