"""Writes the weights of a Hugging Face folder: one safetensors file, or several with an index."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from openpalm.checkpoint import tensors

MAX_SHARD_BYTES = 5 * 10**9


@contextmanager
def filled_shards(
    folder: Path, layout: tensors.Layout, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[Callable[[str, Tensor], None]]:
    """The files, filled by calls with a name and its tensor, in any order. Raises OSError."""
    shards = _shards_of(layout, max_shard_bytes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(names, file if len(shards) > 1 else "model.safetensors")
    if len(shards) > 1:
        size = sum(_bytes(entry) for entry in layout.values())
        index = {"metadata": {"total_size": size}, "weight_map": files}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with ExitStack() as stack:
        puts: dict[str, Callable[[str, Tensor], None]] = {}
        for names in shards:
            own = {name: layout[name] for name in names}
            file = folder / files[names[0]]
            put = stack.enter_context(tensors.filled(file, own, {"format": "pt"}))
            puts |= dict.fromkeys(names, put)
        yield lambda name, tensor: puts[name](name, tensor)


def _shards_of(layout: tensors.Layout, most: int) -> list[list[str]]:
    """Consecutive tensors, up to `most` bytes in each shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _bytes(entry) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(entry)
    return shards


def _bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(entry[0]) * entry[1].itemsize
