"""Moves a rollout that is too large for memory (--rollout-memory-bytes) to a temporary file.

The file has no name, so the system deletes it when the process ends, however that happens. Rows are
read from disk when they are used.
"""

import math
import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def spill(columns: dict[str, Tensor], limit: int, folder: Path) -> dict[str, Tensor]:
    """The columns unchanged, or backed by a file in `folder` if they have more than `limit` bytes.

    Raises OSError if the disk is full.
    """
    if sum(column.nbytes for column in columns.values()) <= limit:
        return columns
    offsets: dict[str, int] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, column in columns.items():
            file.write(b"\0" * (-file.tell() % 8))  # aligned for any dtype
            offsets[name] = file.tell()
            file.write(column.contiguous().numpy().data)
        file.flush()
        # The mapping keeps the closed file. Copy-on-write, because torch requires writable memory.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _mapped(mapping, offsets[name], column) for name, column in columns.items()}


def _mapped(mapping: mmap.mmap, offset: int, like: Tensor) -> Tensor:
    """The tensor at `offset`, of the shape and dtype of `like`."""
    count = math.prod(like.shape)
    flat = torch.frombuffer(mapping, dtype=like.dtype, count=count, offset=offset)
    return flat.view(like.shape)
