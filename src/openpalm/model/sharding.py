"""Parameters that may be sharded over processes (DTensor): assign, read, and locate their parts.

A parameter of one process is an ordinary tensor, and every function here accepts it too.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor.

    Importing the class takes half a second, which a process without one, such as a server, saves:
    who shards a tensor has imported it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copies the whole `value` into the parameter: each process keeps its own part of it.

    Every process must have the same value. Nothing is communicated.
    """
    if is_sharded(parameter):
        local_part(parameter).copy_(value[local_slices(parameter)])
    else:
        parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process. Of a sharded one it is gathered: all processes call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of the tensor, which shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part_or_none(tensor: Tensor | None) -> Tensor | None:
    """`local_part` of a parameter that some models do not have."""
    return None if tensor is None else local_part(tensor)


def local_slices(tensor: Tensor, coordinate: Sequence[int] | None = None) -> tuple[slice, ...]:
    """Where this process's part is in the whole tensor: one slice per dimension.

    coordinate: on the tensor's mesh, of another process instead.
    """
    spans = [(0, size) for size in tensor.shape]
    if is_sharded(tensor):
        coordinate = _coordinate(tensor) if coordinate is None else coordinate
        for axis in _order(tensor):
            dim: int = tensor.placements[axis].dim  # type: ignore[attr-defined]
            start, stop = spans[dim]
            cut = chunk_span(stop - start, tensor.device_mesh.size(axis), coordinate[axis])
            spans[dim] = start + cut[0], start + sum(cut)
    return tuple(slice(*span) for span in spans)


def chunk_span(size: int, parts: int, number: int) -> tuple[int, int]:
    """Start and length of a part of a dimension of `size`, cut as torch.chunk cuts it.

    Parts have ceil(size / parts) each; the last ones are shorter or empty.
    """
    most = -(-size // parts)
    start = min(number * most, size)
    return start, min(most, size - start)


def is_first_copy(tensor: Tensor, coordinate: Sequence[int] | None = None) -> bool:
    """Whether this process is the first of those that hold this part of the tensor.

    coordinate: on the tensor's mesh, of another process instead.
    """
    if not is_sharded(tensor):
        return True
    coordinate = _coordinate(tensor) if coordinate is None else coordinate
    copies = (c for c, p in zip(coordinate, tensor.placements, strict=True) if p.is_replicate())
    return not any(copies)


def _coordinate(tensor: "DTensor") -> Sequence[int]:
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this process is not part of the tensor's mesh"
    return coordinate


def _order(tensor: "DTensor") -> list[int]:
    """The mesh's axes in the order in which they cut the tensor.

    FSDP shards what tensor parallelism has sharded before, though its axis comes first: torch marks
    that by a strided placement.
    """
    cut = [n for n, p in enumerate(tensor.placements) if not p.is_replicate()]
    strided = [n for n in cut if _is_strided(tensor.placements[n])]
    return [n for n in cut if n not in strided] + strided


def _is_strided(placement: object) -> bool:
    return type(placement).__name__ == "_StridedShard"
