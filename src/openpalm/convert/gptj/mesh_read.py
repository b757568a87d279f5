"""Reads checkpoints of mesh-transformer-jax, full and slim, of any number of shards."""

import re
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch
from torch import Tensor

from openpalm.base.json_file import read_json
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor
from openpalm.convert.files import Hyperparameters
from openpalm.convert.gptj.mesh_files import Shard
from openpalm.convert.gptj.mesh_layout import leaves_of, sections
from openpalm.convert.gptj.names import gptj_config, joined, part_shapes, parts_of
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model.config import ModelConfig

_MAX_SHARDS = 1024
_PER_LAYER = 10
_AROUND = 6
"""leaves outside the layers: embedding, head, final norm"""
_GPT_J = {"layers": 28, "d_model": 4096, "n_heads": 16, "n_vocab": 50400, "pe_rotary_dims": 64}
_REMEDY = "give the config that it was trained with: --config CONFIG.json"


@dataclass(frozen=True)
class MeshCheckpoint:
    """A checkpoint; its tensors are read on access."""

    folder: Path
    config: ModelConfig
    weights: LazyState
    moments: LazyState | None
    """optimizer state as OpenPaLM names it, `<parameter>/<slot>`; None for a slim checkpoint"""
    step: int
    shards: int
    notes: list[str]
    checksums: dict[str, str]
    """the zip files' own checksums of their arrays, by file"""


def find_step(path: Path) -> Path | None:
    """The folder that holds shard_0: `path`, or the newest step in it; None if there is none."""
    if (path / "shard_0").is_dir():
        return path
    found = [p for p in path.glob("step_*") if re.fullmatch(r"step_\d{1,12}", p.name)]
    found = [p for p in found if (p / "shard_0").is_dir()]
    if not found:
        return None
    if (path / "meta.json").is_file():
        saved = read_json(path / "meta.json", _REMEDY).get("checkpoints")
        named = f"step_{saved[-1]}" if isinstance(saved, list) and saved else ""
        if chosen := [p for p in found if p.name == named]:
            return chosen[0]
        raise CheckpointError(f"{path}: its meta.json names no step that is here; name a step_N")
    return max(found, key=lambda p: int(p.name[5:]))


def read_mesh(path: Path, config_path: Path | None = None) -> MeshCheckpoint:
    """Opens a model directory or one of its step_N folders; reads headers and small arrays only.

    config_path: the JSON config of the training, which has the sizes; None looks for config.json
    at the checkpoint, and knows GPT-J's sizes. Raises CheckpointError.
    """
    folder = find_step(path)
    if folder is None:
        raise CheckpointError(f"{path}: holds no shard_0 and no step_N with one; check the path")
    shards = _shards(folder)
    notes: list[str] = []
    given = _config_file(folder, config_path) or _known_sizes(shards, folder, notes)
    config = _config(given)
    reader = _Reader(folder, config, shards)
    declared = given.whole("cores_per_replica")
    if declared not in (None, len(shards)):
        notes.append(f"its config says {declared} shards, the files are {len(shards)}")
    kind = "full, with the optimizer's moments" if reader.sections.moments else "slim"
    dtype = str(reader.dtype)[6:]
    notes.insert(0, f"{kind}, {dtype}, step {reader.step}, shards: {len(shards)}")
    notes.append(f"padded vocabulary: {config.vocab_size} rows; the tokenizer may have fewer ids")
    return MeshCheckpoint(
        folder,
        config,
        reader.weights(),
        reader.moments() if reader.sections.moments else None,
        reader.step,
        len(shards),
        notes,
        {name: sums for shard in shards for name, sums in shard.checksums.items()},
    )


def _shards(folder: Path) -> list[Shard]:
    numbers = [
        int(path.name[6:]) for path in folder.iterdir() if re.fullmatch(r"shard_\d{1,4}", path.name)
    ]
    if sorted(numbers) != list(range(len(numbers))) or len(numbers) > _MAX_SHARDS:
        raise CheckpointError(
            f"{folder}: its shards are {sorted(numbers)[:9]}, where shard_0, shard_1, ... belong"
        )
    shards = [Shard(folder / f"shard_{number}") for number in range(len(numbers))]
    if len({shard.count for shard in shards}) > 1:
        raise CheckpointError(f"{folder}: its shards hold different numbers of arrays; one is odd")
    return shards


def _config_file(folder: Path, given: Path | None) -> Hyperparameters | None:
    """The config given, or config.json at the step, the model directory or the folder above."""
    places = [given] if given else [up / "config.json" for up in (folder, *folder.parents[:2])]
    for path in places:
        if path.is_file() or given:
            values = read_json(path, "check the path that --config gives")
            if given or {"layers", "d_model"} <= values.keys():
                return Hyperparameters(str(path), values)
    return None


def _known_sizes(shards: list[Shard], folder: Path, notes: list[str]) -> Hyperparameters:
    """GPT-J's sizes, if the number of arrays is that of its layers; `read` checks the shapes."""
    leaves = _AROUND + _PER_LAYER * _GPT_J["layers"]
    if shards[0].count not in {sections(leaves, optimizer=full).leaves for full in (True, False)}:
        raise CheckpointError(f"{folder}: the files do not tell the model's sizes; {_REMEDY}")
    notes.append("no config at the checkpoint: GPT-J-6B's sizes are assumed (28 layers)")
    return Hyperparameters("GPT-J-6B", dict(_GPT_J))


def _config(given: Hyperparameters) -> ModelConfig:
    names = ("layers", "d_model", "n_heads", "n_vocab")
    layers, dim, heads, vocab = given.required(*names, remedy=_REMEDY)
    for name, only in (("norm", "layernorm"), ("pe", "rotary")):
        if (found := given.values.get(name, only)) != only:
            raise CheckpointError(f"{given.where}: {name} {found!r:.40} is not read, only {only}")
    if dim % heads:
        raise CheckpointError(f"{given.where}: n_heads {heads} does not divide d_model {dim}")
    try:
        return gptj_config(
            vocab_size=vocab,
            dim=dim,
            depth=layers,
            heads=heads,
            rotary_dims=given.whole("pe_rotary_dims") or dim // heads,
            context=given.whole("seq") or 2048,
            ff_dim=4 * dim,
            embedding_bias=True,
        )
    except SettingsError as error:
        raise CheckpointError(f"{given.where}: {error}") from None


class _Reader:
    """Joins the arrays of all shards."""

    def __init__(self, folder: Path, config: ModelConfig, shards: list[Shard]):
        self.folder, self.config, self.shards = folder, config, shards
        check_divides(config, len(shards), str(folder))
        # Two parameters and a position each: too many layers for the files must not fill memory.
        if config.depth * _PER_LAYER > shards[0].count:
            raise self._other_config()
        leaves = leaves_of(config)
        by_count = {sections(len(leaves), optimizer=o).leaves: o for o in (True, False)}
        if shards[0].count not in by_count:
            raise self._other_config()
        self.sections = sections(len(leaves), optimizer=by_count[shards[0].count])
        self.leaves = {leaf.name: (index, leaf) for index, leaf in enumerate(leaves)}
        self.dtype = shards[0].dtype(self.sections.parameters)
        self.step = int(shards[0].read(self.sections.leaves - 1, ()))

    def _other_config(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: holds {self.shards[0].count} arrays per shard, which a model of "
            f"{self.config.depth} layers does not have; {_REMEDY}"
        )

    def weights(self) -> LazyState:
        # The sum of N copies is exact in the files' own type only for some N.
        exact = len(self.shards) & (len(self.shards) - 1) == 0

        def dtype(name: str) -> torch.dtype:
            summed = self.leaves[name][1].join == "sum"
            return self.dtype if exact or not summed else torch.float32

        def read(name: str) -> Tensor:
            return self._joined(name, self.sections.parameters).to(dtype(name))

        return joined(self.folder, self.config, read, dtype)

    def moments(self) -> LazyState:
        assert self.sections.moments is not None
        entries: dict[str, LazyTensor] = {}
        for slot, start in zip(("exp_avg", "exp_avg_sq"), self.sections.moments, strict=True):

            def read(name: str, start: int = start) -> Tensor:
                return self._joined(name, start, moment=True)

            suffix = f"/{slot}"
            entries |= joined(
                self.folder, self.config, read, lambda _: torch.float32, suffix
            ).entries
        count = float(self.shards[0].read(0, ()))
        for name in parts_of(self.config):
            entries[f"{name}/step"] = LazyTensor(
                (), torch.float32, lambda: torch.tensor(count, dtype=torch.float32)
            )
        return LazyState(self.folder, entries)

    def _joined(self, name: str, start: int, *, moment: bool = False) -> Tensor:
        """One part, joined from its shards, in OpenPaLM's orientation.

        start: the first leaf of the section. Moments of a summed bias are equal copies: the
        gradient of the sum is that of each share.
        """
        index, leaf = self.leaves[name]
        shape = leaf.shard_shape(len(self.shards))
        if leaf.join == "first" or (leaf.join == "sum" and moment):
            return self.shards[0].read(start + index, shape)
        if leaf.join == "sum":
            # In float64, because three times a float32 may already be rounded.
            shares = [shard.read(start + index, shape).double() for shard in self.shards]
            return torch.stack(shares).sum(dim=0).float()
        whole = torch.empty(
            part_shapes(self.config)[name], dtype=self.shards[0].dtype(start + index)
        )
        along = (leaf.join == "columns") != leaf.transposed and len(leaf.shape) == 2
        for shard, target in zip(
            self.shards, whole.chunk(len(self.shards), int(along)), strict=True
        ):
            array = shard.read(start + index, shape)
            target.copy_(array.T if leaf.transposed else array)
        return whole


def check_divides(config: ModelConfig, shards: int, where: str) -> None:
    """Raises CheckpointError unless `shards` divides heads, d_model and vocabulary."""
    sizes = {"n_heads": config.heads, "d_model": config.dim, "n_vocab": config.vocab_size}
    if odd := [f"{name} {size}" for name, size in sizes.items() if size % shards]:
        common = gcd(*sizes.values())
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise CheckpointError(
            f"{where}: {shards} shards do not divide {', '.join(odd)}; numbers that do: {fit}"
        )
