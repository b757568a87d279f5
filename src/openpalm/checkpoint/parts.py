"""Writes one safetensors file from several processes, each its own part of every tensor.

The file holds whole tensors, as that of one process does: any number of processes, in any layout,
can read it. No process needs memory for a whole model. All must see the same file system.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openpalm.base.files import wait_until_seen
from openpalm.checkpoint import tensors
from openpalm.model.sharding import is_first_copy, local_part, local_slices
from openpalm.parallel.world import World


class Part(NamedTuple):
    """This process's part of a tensor, in the CPU's memory."""

    shape: tuple[int, ...]
    """of the whole tensor"""
    slices: tuple[slice, ...]
    """where the part is in it"""
    values: Tensor
    sharded: bool
    """whether other processes have the other parts; else each that has the tensor has all of it"""


def snapshot(stored: Mapping[str, Tensor]) -> dict[str, Part]:
    """Copies of this process's parts, without those that another process writes."""
    return {
        name: Part(
            tuple(tensor.shape),
            local_slices(tensor),
            local_part(tensor).detach().to("cpu", copy=True).contiguous(),
            isinstance(tensor, DTensor),
        )
        for name, tensor in stored.items()
        if is_first_copy(tensor)
    }


def write_parts(path: Path, parts: Mapping[str, Part], world: World) -> None:
    """Writes the file; all processes must call it. Raises OSError on all if one could not write."""
    own = {name: (part.shape, part.values.dtype, part.sharded) for name, part in parts.items()}
    everyone = world.gather(own)
    layout: tensors.Layout = {
        name: (shape, dtype) for found in everyone for name, (shape, dtype, _) in found.items()
    }
    text, offsets = tensors.header(layout)

    def create() -> None:
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(text)
            file.truncate(len(text) + sum(_bytes(*entry) for entry in layout.values()))

    world.on_main(create)
    # A tensor that several processes have whole is written by the first of them.
    first = {name: rank for rank in reversed(range(world.size)) for name in everyone[rank]}
    mine = {name: p for name, p in parts.items() if p.sharded or first[name] == world.rank}
    # Nothing in there waits for other processes: one that fails must not leave them waiting.
    world.together(lambda: _write_own(path, mine, offsets, world.rank))


def _write_own(
    path: Path, parts: Mapping[str, Part], offsets: Mapping[str, int], rank: int
) -> None:
    try:
        # The main process made the file, perhaps on another machine.
        wait_until_seen(path)
        with path.open("r+b") as file:
            for name, part in parts.items():
                for offset, values in _runs(part):
                    _write_at(file.fileno(), values, offsets[name] + offset)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, on process {rank}", str(path)) from error


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _runs(part: Part) -> Iterator[tuple[int, Tensor]]:
    """The stretches of the file that the part fills: byte offset in the tensor, and values."""
    if not part.values.numel():
        return
    sizes = [s.stop - s.start for s in part.slices]
    # Dimensions after the last one that is cut are whole, so a run goes on through them.
    cut = [n for n, size in enumerate(sizes) if size != part.shape[n]]
    inner = cut[-1] if cut else 0
    rows = part.values.reshape(*sizes[:inner], -1)
    strides = [math.prod(part.shape[n + 1 :]) for n in range(len(part.shape))]
    for index in itertools.product(*(range(size) for size in sizes[:inner])):
        starts = [s.start + i for s, i in zip(part.slices, index, strict=False)]
        starts += [part.slices[inner].start] if part.slices else []
        offset = sum(start * stride for start, stride in zip(starts, strides, strict=False))
        yield offset * part.values.dtype.itemsize, rows[index]


def _write_at(descriptor: int, values: Tensor, offset: int) -> None:
    data = tensors.raw_bytes(values.contiguous())
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
