"""Writes checkpoints of mesh-transformer-jax, full and slim, at any number of shards.

One array is in memory at a time: it is cut into the shards of a file while their archives are open.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from openpalm.checkpoint.tensors import raw_bytes
from openpalm.convert.gptj.mesh_files import write_header
from openpalm.convert.gptj.mesh_layout import FILES, Leaf, leaves_of, places_of
from openpalm.convert.gptj.mesh_read import check_divides
from openpalm.convert.gptj.names import check_is_gptj, part
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig

Shards = Callable[[int], Tensor]
"""The array of a shard, by its number."""


def check_writable(config: ModelConfig, shards: int) -> None:
    """Raises CheckpointError for a model that mesh-transformer-jax cannot hold so."""
    check_is_gptj(config, "mesh-transformer-jax", tied=False, ff_dim=4 * config.dim, norm_eps=1e-5)
    check_divides(config, shards, f"--shards {shards}")


def write_mesh(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None,
    *,
    shards: int,
    step: int,
) -> None:
    """Writes step_N, and with moments a model directory's meta.json, and the config.json.

    moments: AdamW's state as OpenPaLM names it; None writes a slim checkpoint. Raises OSError,
    CheckpointError for weights or moments that do not belong to the config.
    """
    folder = directory / f"step_{step}"
    for shard in range(shards):
        (folder / f"shard_{shard}").mkdir(parents=True)
    leaves = list(_leaves(config, weights, moments, shards, step))
    by_file = groupby(zip(places_of(len(leaves)), leaves, strict=True), lambda item: item[0][0])
    names = {number: [leaf for _, leaf in items] for number, items in by_file}
    for number in range(FILES):
        with ExitStack() as files:
            archives = [
                files.enter_context(
                    zipfile.ZipFile(folder / f"shard_{shard}" / f"{number}.npz", "w")
                )
                for shard in range(shards)
            ]
            for index, make in enumerate(names.get(number, [])):
                of_shard = make()
                for shard, archive in enumerate(archives):
                    _write_array(archive, index, of_shard(shard))
    _write_json(directory / "config.json", config_json(config, shards))
    if moments is not None:
        loader = {"train_loader": {"file_idx": 0, "file_offset": 0}}
        meta = {"step": step, "checkpoints": [step], "aux": {str(step): loader}}
        _write_json(directory / "meta.json", meta)


def config_json(config: ModelConfig, shards: int) -> dict[str, object]:
    """The keys of a config that describe the model."""
    return {
        "layers": config.depth,
        "d_model": config.dim,
        "n_heads": config.heads,
        "n_vocab": config.vocab_size,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": config.rotated,
        "seq": config.context,
        "cores_per_replica": shards,
    }


def _leaves(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor] | None,
    shards: int,
    step: int,
) -> Iterator[Callable[[], Shards]]:
    """Reads each leaf when it is called, in the order of the files."""
    leaves = leaves_of(config)

    def whole(value: int) -> Callable[[], Shards]:
        return lambda: lambda _: torch.tensor(value, dtype=torch.int32)

    def of(leaf: Leaf, state: Mapping[str, Tensor], slot: str) -> Callable[[], Shards]:
        return lambda: _cut(leaf, _part(config, state, leaf, slot), shards, moment=bool(slot))

    if moments is not None:
        count = _count(moments, step)
        yield whole(count)
        for slot in ("/exp_avg", "/exp_avg_sq"):
            yield from (of(leaf, moments, slot) for leaf in leaves)
        yield whole(count)
    yield from (of(leaf, weights, "") for leaf in leaves)
    yield whole(step)


def _count(moments: Mapping[str, Tensor], step: int) -> int:
    """Adam's count: the steps of the moments, which may differ from the run's."""
    counts = {int(moments[name]) for name in moments if name.endswith("/step")}
    if len(counts) > 1:
        raise CheckpointError(f"the optimizer's step counts differ ({sorted(counts)[:3]})")
    return counts.pop() if counts else step


def _part(config: ModelConfig, state: Mapping[str, Tensor], leaf: Leaf, slot: str) -> Tensor:
    if leaf.name == "embedding_bias" and not config.embedding_bias:
        return torch.zeros(config.dim, dtype=torch.float32 if slot else _dtype(state))
    return part(config, state, leaf.name, slot)


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    return state["norm.weight"].dtype


def _cut(leaf: Leaf, tensor: Tensor, shards: int, *, moment: bool) -> Shards:
    if leaf.join == "sum":
        # Every shard adds its share; moments are those of each share, so equal copies.
        shares = [tensor] * shards if moment else _shares(tensor, shards)
        return lambda shard: shares[shard]
    if leaf.join == "first":
        # Copies of the other shards are never used: the original leaves them as they began.
        unused = 1.0 if leaf.name.endswith("weight") and not moment else 0.0
        return lambda shard: tensor if shard == 0 else torch.full_like(tensor, unused)
    rows = (leaf.join == "rows") != leaf.transposed or len(leaf.shape) == 1
    pieces = tensor.chunk(shards, 0 if rows else 1)
    return lambda shard: pieces[shard].T if leaf.transposed else pieces[shard]


def _shares(bias: Tensor, shards: int) -> list[Tensor]:
    """Equal shares that sum to a bias: exactly so for a power of two of shards."""
    share = (bias.float() / shards).to(bias.dtype)
    rest = bias.float() - share.float() * shards
    return [(share.float() + rest).to(bias.dtype), *[share] * (shards - 1)]


def _write_array(archive: zipfile.ZipFile, index: int, tensor: Tensor) -> None:
    with archive.open(f"arr_{index}.npy", "w", force_zip64=True) as stream:
        write_header(stream, tensor.dtype, tuple(tensor.shape))  # pyright: ignore
        stream.write(raw_bytes(tensor.contiguous()))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
