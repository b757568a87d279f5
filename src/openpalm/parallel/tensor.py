"""Tensor parallelism, with sequence parallelism: processes share every matrix multiplication.

Attached from outside (Shoeybi et al. 2019, Megatron-LM; Korthikanti et al. 2022, sequence
parallelism). Each process has some query heads, hidden units and rows of the vocabulary. A parallel
block needs its input on all processes and the sum of their outputs: two all-reduces for forward and
backward, or, where the processes also share the positions between the blocks, two all-gathers and
two reduce-scatters. Keys and values of few heads are computed by every process.
"""

import re
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from openpalm.errors import SettingsError
from openpalm.model.block import Block, ResidualStream
from openpalm.model.config import ModelConfig
from openpalm.model.cross_entropy import computed_dtype
from openpalm.model.sharding import chunk_span, local_part
from openpalm.model.transformer import Transformer
from openpalm.parallel.collectives import Group, gathered, joined, scattered, shared, span, summed
from openpalm.parallel.key_heads import own_key_heads, read_own_keys, shared_by_heads
from openpalm.parallel.vocabulary import SharedEmbedding, SharedHead
from openpalm.parallel.world import World

_ROWS = {"q", "gate", "up", "up_bias", "embedding", "unembedding", "head_bias"}
"""Parameters cut by rows: each process computes some outputs."""
_COLUMNS = {"out", "down"}
"""Matrices cut by columns: each process has some inputs and computes a part of every sum."""
_PARTIAL = {"kv", "q_scale", "k_scale", "down_bias"}
"""Parameters on every process with a gradient that is a sum over the processes."""
_PARTIAL_BY_POSITION = {"embedding_bias", "marks"}
"""The same, if the processes share the positions; so are the norms of the blocks."""


def check(config: ModelConfig, processes: int) -> None:
    """Raises SettingsError if the model's sizes cannot be shared by so many processes."""
    if _fits(config, processes):
        return
    *most, last = (str(n) for n in range(1, config.heads + 1) if _fits(config, n))
    listed = f"{', '.join(most)} or {last}" if most else last
    raise SettingsError(
        f"--parallel.tensor {processes}: must divide heads ({config.heads}) and ff_dim "
        f"({config.ff_dim}), and every process needs rows of the vocabulary "
        f"({config.padded_vocab}); use {listed}"
    )


def _fits(config: ModelConfig, processes: int) -> bool:
    if config.heads % processes or config.ff_dim % processes:
        return False
    _, last = chunk_span(config.padded_vocab, processes, processes - 1)
    return last > 0


def shard_tensor(model: Transformer, world: World, *, sequence: bool) -> None:
    """Shares the model's matrices between the tensor-parallel processes, in place.

    Every parameter becomes a DTensor on the mesh's axis `tensor`; it may be on the meta device. An
    adapter must be attached before, and FSDP after it. sequence: share positions, too. Does nothing
    for one tensor-parallel process. Raises SettingsError for sizes that cannot be shared.
    """
    if world.axes.tensor == 1:
        return
    check(model.config, world.axes.tensor)
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    by_heads = shared_by_heads(model.config, world.axes.tensor)
    partial_gradients = set[str]()
    for name, parameter in list(model.named_parameters()):
        place, kind = name.rpartition(".")[::2]
        placement = _placement(place, kind, by_heads=by_heads)
        module = model.get_submodule(place)
        module._parameters[kind] = _placed(parameter, mesh, placement)
        if placement.is_replicate() and _is_partial(place, kind, sequence=sequence):
            partial_gradients.add(name)
    for transformer in _transformers(model):  # also a critic's own trunk
        stream = TensorStream(mesh.get_group(), sequence=sequence)
        _share(transformer, stream)
    cast(TensorStream, model.stream).partial_gradients = frozenset(partial_gradients)


def sum_gradients(model: Transformer) -> None:
    """Sums the gradients of parameters that every tensor-parallel process has and uses partly.

    Once a step, after the last backward pass and before the gradients are read.
    """
    if not isinstance(model.stream, TensorStream):
        return
    found = [model.get_parameter(name).grad for name in sorted(model.stream.partial_gradients)]
    parts = [local_part(gradient) for gradient in found if gradient is not None]
    if parts:
        total = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(total, group=model.stream.group)
        for part, summed_part in zip(parts, total.split([p.numel() for p in parts]), strict=True):
            part.copy_(summed_part.view_as(part))


class TensorStream(ResidualStream):
    """The residual stream of tensor-parallel processes: on each of them, or shared by position."""

    def __init__(self, group: Group, *, sequence: bool):
        super().__init__()
        self.group = group
        self.sequence = sequence
        self.partial_gradients: frozenset[str] = frozenset()

    def enter(self, n: Tensor, time: int) -> Tensor:
        n = n.to(computed_dtype(n))  # half the bytes to send, if the projections cast it anyway
        return gathered(n, time, 1, self.group) if self.sequence else shared(n, self.group)

    def leave(self, update: Tensor, dropout: float, training: bool) -> Tensor:
        if not self.sequence or update.dim() == 2:
            return F.dropout(summed(update, self.group), dropout, training)
        part = scattered(update, 1, self.group)
        if not (training and dropout):
            return part
        # One mask for all positions, so that every process draws the same random numbers.
        return part * self.part(F.dropout(torch.ones_like(update), dropout))

    def part(self, x: Tensor) -> Tensor:
        if not self.sequence or x.dim() == 1:
            return x
        return x.narrow(1, *span(x.shape[1], self.group))

    def whole(self, x: Tensor, time: int) -> Tensor:
        return joined(x, time, 1, self.group) if self.sequence else x


class _StreamEmbedding(SharedEmbedding):
    """Embeddings of this process's part of the positions."""

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return scattered(self.terms(ids, table), 1, self.group)


def _share(model: Transformer, stream: TensorStream) -> None:
    """Replaces what exchanges activations, and what reads some parameters."""
    group = stream.group
    model.stream = stream
    model.embed = (_StreamEmbedding if stream.sequence else SharedEmbedding)(group)
    model.project_head = SharedHead(group)
    model.kv_heads = own_key_heads(model.config, group)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.stream = TensorStream(group, sequence=stream.sequence)
        block.project_out.readers["down_bias"] = partial(_portion, processes=group.size())
        if model.config.kv_heads > 1:
            read_own_keys(block, model.config, group)


def _transformers(model: Transformer) -> list[Transformer]:
    return [module for module in model.modules() if isinstance(module, Transformer)]


def _portion(bias: Tensor, processes: int) -> Tensor:
    """A bias that every process adds to its part of a sum."""
    return local_part(bias) / processes


def _placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    # Without a source rank nothing is communicated: the values come later.
    tensor = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _placement(module: str, name: str, *, by_heads: bool) -> Placement:
    """Placement of the parameter `name` of a module, by its name in the model.

    by_heads: whether keys and values are shared by heads.
    """
    rows = _ROWS | {"kv", "k", "v"} if by_heads else _ROWS
    if ".lora." in module:
        target = module.rsplit(".", 1)[-1]
        if name == "a":  # [rank, columns]
            return Shard(1) if target in _COLUMNS else Replicate()
        return Shard(0) if target in rows else Replicate()
    if name in rows:
        return Shard(0)
    return Shard(1) if name in _COLUMNS else Replicate()


def _is_partial(module: str, name: str, *, sequence: bool) -> bool:
    """Whether a parameter that all processes have gets a part of its gradient on each."""
    if ".lora." in module or name in _PARTIAL:
        return True
    in_block = re.search(r"blocks\.\d+\.norm$", module) is not None
    return sequence and (in_block or name in _PARTIAL_BY_POSITION)
