"""Several LoRA adapters over one base model: every row of a batch has its own adapter, or none.

The base model's matrices compute all rows, and each adapter adds B A x to its own rows. So the
base's weights are in memory once, and rows without an adapter equal the base bit for bit. An
adapter belongs to a request, so the engine keeps no list of them. Ranks and targets may differ.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from openpalm.generate.quantize import Matrix, Side, make_matrix, with_matrices
from openpalm.model.config import LoraConfig, ModelConfig
from openpalm.model.lora import INPUTS
from openpalm.model.transformer import Transformer

Place = tuple[int, Side]
"""A block's number, and one of its two fused matrices."""
MIN_ROWS = 8
"""Fewer rows are multiplied several times, which costs nothing that can be measured."""
_serials = itertools.count(1)


class LowRank:
    """(alpha / rank) B A for one fused matrix, [rows, columns].

    a: [ranks, columns]. b: matrices [rows, rank] of neighbouring rows of the result; the first
    reads the first of A's outputs, and so on. One of rank 0 stands for rows without an update.
    """

    def __init__(self, a: Tensor, b: Sequence[Tensor]):
        self.dtype = a.dtype
        self.a = make_matrix(a, "float32")
        self.b = [part.T.contiguous() for part in b]  # [rank, rows], which is faster for few rows
        self.ranks = [part.shape[1] for part in b]

    def __call__(self, x: Tensor, count: int) -> Tensor:
        """The update of the first `count` of the rows x [rows, time, columns]; see `repeated`."""
        h = self.a(x.to(self.dtype)).flatten(0, 1)
        kept = count * x.shape[1]
        parts = zip(h.split(self.ranks, 1), self.b, strict=True)
        update = torch.cat([torch.mm(own, b)[:kept] for own, b in parts], dim=1)
        return update.unflatten(0, (count, -1))


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in the layout that the engine computes with; `pack` makes it."""

    model: ModelConfig
    updates: dict[Place, LowRank]
    """missing where the adapter changes none of a fused matrix's rows"""
    serial: int = field(default_factory=_serials.__next__)
    """identifies it in the engine's cache, which must not keep a removed adapter in memory"""


def pack(model: Transformer, lora: LoraConfig, factors: Mapping[str, Tensor]) -> Adapter:
    """Packs the factors of an adapter (`blocks.0.project_in.lora.q.a`) for engines of `model`."""
    # float32 on a CPU, whatever the model's dtype: more accurate, and no slower in small matrices.
    table = model.embedding
    dtype = torch.float32 if table.device.type == "cpu" else table.dtype
    packed = {
        # The scale is applied once here, not for every token.
        name: (factor.float() * (lora.scale if name.endswith(".b") else 1)).to(table.device, dtype)
        for name, factor in factors.items()
    }
    updates: dict[Place, LowRank] = {}
    for layer in range(model.config.depth):
        inputs = [name for name in model.config.matrices if name in INPUTS]
        outputs = [name for name in model.config.matrices if name not in INPUTS]
        if any(name in lora.targets for name in inputs):
            a, b = _factors(packed, f"blocks.{layer}.project_in", inputs, model, dtype)
            updates[layer, "project_in"] = LowRank(torch.cat(a), b)
        if any(name in lora.targets for name in outputs):
            a, b = _factors(packed, f"blocks.{layer}.project_out", outputs, model, dtype)
            # The fused matrix reads [attended, hidden], and each A one of the two.
            updates[layer, "project_out"] = LowRank(torch.block_diag(*a), [torch.cat(b, dim=1)])
    return Adapter(model.config, updates)


def _factors(
    packed: Mapping[str, Tensor],
    prefix: str,
    names: Sequence[str],
    model: Transformer,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of each of the matrices, of rank 0 for those that are no targets."""
    empty = torch.empty(0, device=model.embedding.device, dtype=dtype)
    a, b = [], []
    for name in names:
        rows, columns = model.config.matrices[name]
        a.append(packed.get(f"{prefix}.lora.{name}.a", empty.view(0, columns)))
        b.append(packed.get(f"{prefix}.lora.{name}.b", empty.view(rows, 0)))
    return a, b


def repeated(rows: list[int], time: int) -> list[int]:
    """The rows, several times if they have fewer than MIN_ROWS positions together.

    torch.mm has other kernels for few positions, which add in another order. From MIN_ROWS on the
    bits of a position do not depend on the other rows, because ranks are small.
    """
    return rows * -(-MIN_ROWS // (len(rows) * time))


class Group(NamedTuple):
    """The rows of a batch that have the same adapter."""

    adapter: Adapter
    size: int
    rows: Tensor
    sources: Tensor
    """`repeated` rows"""


class Routing:
    """The adapters of the rows that are computed next. The engine sets them before each forward."""

    def __init__(self) -> None:
        self.groups: list[Group] = []

    def assign(self, adapters: Sequence[Adapter | None], time: int, device: torch.device) -> None:
        """Row i of the next forward has adapters[i], at each of its `time` positions."""
        by_adapter: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                by_adapter.setdefault(adapter, []).append(row)
        self.groups = [
            Group(
                adapter,
                len(rows),
                torch.tensor(rows, device=device),
                torch.tensor(repeated(rows, time), device=device),
            )
            for adapter, rows in by_adapter.items()
        ]


class _Routed:
    """A fused matrix of the base with the updates of the rows' adapters."""

    def __init__(self, base: Matrix, place: Place, routing: Routing):
        self.base, self.place, self.routing = base, place, routing

    def __call__(self, x: Tensor) -> Tensor:
        product = self.base(x)
        for adapter, size, rows, sources in self.routing.groups:
            if update := adapter.updates.get(self.place):
                own = update(x.index_select(0, sources), size)
                product.index_add_(0, rows, own.to(product.dtype))
        return product


def routed(model: Transformer, routing: Routing) -> Transformer:
    """A quantized model that adds the updates of `routing`; it shares the weights of `model`."""

    def replaced(matrix: Matrix, layer: int, side: Side) -> Matrix:
        # The model of another engine follows that engine's routing.
        base = matrix.base if isinstance(matrix, _Routed) else matrix
        return _Routed(base, (layer, side), routing)

    return with_matrices(model, replaced)
