"""Where a rollout lies that is too large for memory: in a file that no one else sees.

The file has no name, so nothing is left of it after any end of the process; it is as old as the
rollout, and goes when that is replaced. Rows are read where they are used.
"""

import math
import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def spill(columns: dict[str, Tensor], limit: int, folder: Path) -> dict[str, Tensor]:
    """The columns as they are, or, of more than `limit` bytes, in a file on the disk of `folder`.

    Raises OSError where the disk is full.
    """
    if sum(column.nbytes for column in columns.values()) <= limit:
        return columns
    begins: dict[str, int] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, column in columns.items():
            file.write(b"\0" * (-file.tell() % 8))  # aligned for any dtype
            begins[name] = file.tell()
            file.write(column.contiguous().numpy().data)
        file.flush()
        # The mapping keeps the file; copy-on-write, because torch wants what it may write to.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _at(mapping, begins[name], column) for name, column in columns.items()}


def _at(mapping: mmap.mmap, begin: int, like: Tensor) -> Tensor:
    count = math.prod(like.shape)
    flat = torch.frombuffer(mapping, dtype=like.dtype, count=count, offset=begin)
    return flat.view(like.shape)
