"""Weights in a Hugging Face folder: model.safetensors, or shards with an index.

Knows no model. Nothing in a file is executed; other formats, such as pytorch_model.bin, are not
read.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from openpalm.base.json_file import read_json
from openpalm.checkpoint import tensors
from openpalm.checkpoint.manifest import file_size
from openpalm.errors import CheckpointError, WorkError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9
"""Size of a shard, as transformers writes it."""
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_MAX_SHARDS = 10_000


class Stored(NamedTuple):
    """A tensor in a file."""

    file: tensors.TensorFile
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path, stored: dict[str, Stored]):
        self.folder = folder
        self.stored = stored

    @property
    def numbers(self) -> int:
        return sum(torch.Size(each.shape).numel() for each in self.stored.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors; float32 if they differ."""
        found = {each.dtype for each in self.stored.values()}
        return found.pop() if len(found) == 1 else torch.float32

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless names and shapes are those of `expected`."""
        shapes = {name: each.shape for name, each in self.stored.items()}
        odd = min((name for name, _ in shapes.items() ^ expected.items()), default=None)
        if odd is not None:
            found, wanted = shapes.get(odd), expected.get(odd)
            raise CheckpointError(
                f"{self.folder}: {odd} is {list(found) if found else 'absent'}, but config.json "
                f"needs {list(wanted) if wanted else 'no such tensor'}; take another copy"
            )

    def read(self, name: str) -> Tensor:
        """The tensor. Raises CheckpointError if a number is NaN or infinite."""
        return self.stored[name].file.finite(name)


@contextmanager
def opened(folder: Path) -> Iterator[Weights]:
    """Opens the weights of a folder. Raises CheckpointError if a file is missing or damaged."""
    with ExitStack() as stack:
        stored: dict[str, Stored] = {}
        index = _index(folder)
        names = sorted(set(index.values())) if index else [SINGLE]
        for name in names:
            if file_size(folder / name, regular=True) is None:
                raise CheckpointError(f"{folder}: {name} is missing; take another copy")
            file = stack.enter_context(tensors.opened(folder / name))
            for tensor, shape in file.shapes().items():
                if tensor in stored or (index and index.get(tensor) != name):
                    raise CheckpointError(
                        f"{folder}: {INDEX} does not place {tensor:.80} in {name}; take another "
                        "copy"
                    )
                dtype = _STORED.get(file.dtype_name(tensor))
                if dtype is None:
                    raise CheckpointError(
                        f"{folder}: {tensor:.80} is {file.dtype_name(tensor)}; only float32, "
                        "bfloat16 and float16 are read"
                    )
                stored[tensor] = Stored(file, shape, dtype)
        if index and (missing := min(index.keys() - stored.keys(), default=None)):
            raise CheckpointError(f"{folder}: {index[missing]} holds no {missing:.80}")
        yield Weights(folder, stored)


def _index(folder: Path) -> dict[str, str]:
    """Shard of each tensor by model.safetensors.index.json; empty for a single file."""
    if file_size(folder / SINGLE, regular=True) is not None:
        return {}
    where = folder / INDEX
    if file_size(where, regular=True) is None:
        raise CheckpointError(
            f"{folder}: holds no {SINGLE} and no {INDEX}; other formats are not read: save the "
            "model again with save_pretrained(..., safe_serialization=True)"
        )
    placed = read_json(where, "take another copy").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{where}: holds no weight_map")
    for shard in placed.values():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(f"{where}: {str(shard)[:60]!r} cannot be the name of a shard")
    if len(set(placed.values())) > _MAX_SHARDS:
        raise CheckpointError(f"{where}: names more than {_MAX_SHARDS:,} shards")
    return placed


def write(
    folder: Path,
    items: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes the tensors in `dtype`; more than `max_shard_bytes` become shards with an index.

    Holds at most one shard in memory. Raises WorkError if a number does not fit `dtype`.
    """
    shard: dict[str, Tensor] = {}
    placed: dict[str, int] = {}
    count, in_shard, total = 0, 0, 0

    def flush() -> None:
        nonlocal count, in_shard
        count += 1
        path = folder / f"model-{count:05d}.safetensors"
        safetensors.torch.save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes files for the owner only
        shard.clear()
        in_shard = 0

    for name, tensor in items:
        # A copy, because safetensors refuses two views of one memory.
        stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not tensors.is_finite(stored):
            raise WorkError(f"{name}: holds numbers that {dtype} cannot; take another --dtype")
        if shard and in_shard + stored.nbytes > max_shard_bytes:
            flush()
        shard[name], placed[name] = stored, count + 1
        in_shard += stored.nbytes
        total += stored.nbytes
    flush()
    _name_shards(folder, count, placed, total)


def _name_shards(folder: Path, count: int, placed: dict[str, int], total: int) -> None:
    """Gives the shards their final names, which have the number of shards in them."""
    if count == 1:
        (folder / "model-00001.safetensors").rename(folder / SINGLE)
        return
    names = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for number, name in names.items():
        (folder / f"model-{number:05d}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[number] for tensor, number in placed.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
