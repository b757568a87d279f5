"""Opens a checkpoint of any format that `openpalm convert` reads, and says what was found."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openpalm import __version__
from openpalm.base.console import shown
from openpalm.base.files import sha256_of
from openpalm.base.json_file import read_json
from openpalm.base.typed import home
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor
from openpalm.checkpoint.manifest import WEIGHTS, read_manifest
from openpalm.checkpoint.streamed_logits import streamed_logits
from openpalm.convert.detect import Project, read_foreign
from openpalm.convert.gptj import huggingface
from openpalm.convert.gptj.mesh_read import find_step, read_mesh
from openpalm.convert.huggingface.names import MODEL_TYPE
from openpalm.convert.huggingface.read import (
    MAX_CONFIG_BYTES,
    read_defaults,
    read_palm,
    read_tokenizer,
)
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, SettingsError
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.model import lora
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import make_model
from openpalm.model.transformer import Transformer

SourceFormat = Literal[
    "openpalm",
    "mesh-transformer-jax",
    "huggingface",
    "palm-rlhf-pytorch",
    "palm-pytorch",
    "nanopalm",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint; its tensors are read on access."""

    format: SourceFormat
    config: ModelConfig
    weights: LazyState
    """OpenPaLM's tensors, an adapter merged"""
    loaded: Transformer | None = None
    """the model itself, where it has an adapter or is in memory anyway"""
    found: str
    """what was read, for one line"""
    notes: list[str] = field(default_factory=list)
    lineage: dict[str, Any]
    reward: RewardConfig | None = None
    optimizer: LazyState | None = None
    """AdamW's state, `<parameter>/<slot>`, if the checkpoint has it"""
    step: int = 0
    tokenizer_json: str | None = None
    history: dict[str, Any] = field(default_factory=dict)
    """lineage of a checkpoint of ours, for the card of an export"""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """sampling settings"""

    def model(self) -> Transformer:
        """The model in memory, in eval mode, in the type of its weights."""
        if self.loaded is not None:
            return self.loaded
        with torch.device("meta"):
            model = Transformer(self.config)
        model.load_state_dict(dict(self.weights), assign=True)
        return model.eval().requires_grad_(False)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits in float32, with one block in memory at a time."""
        return streamed_logits(self.config, self.weights, ids)


def open_source(
    path: Path,
    project: SourceFormat | None = None,
    era: str | None = None,
    config_path: Path | None = None,
) -> Source:
    """Detects the format of `path` and opens it; reads no large tensor of a large checkpoint.

    project: the expected format, None detects it; era and config_path: as for read_foreign. Raises
    CheckpointError for an unknown format, or another than `project`.
    """
    found = detect(path)
    if project not in (None, found) and {project, found} & set(_FOLDERS):
        raise CheckpointError(f"{path}: --from {project}, but it is a checkpoint of {found}")
    if found in _FOLDERS and era is not None:
        raise SettingsError(
            f"--era {era}: is for checkpoints of palm-rlhf-pytorch, but {path} is one of {found}; "
            "leave it out"
        )
    if found == "openpalm":
        _refuse_config(config_path, found)
        return _openpalm(path)
    if found == "huggingface":
        _refuse_config(config_path, found)
        return _huggingface(path)
    if found == "mesh-transformer-jax":
        return _mesh(path, config_path)
    expected = project if project in get_args(Project) else None
    return _of_state_dict(path, expected, era, config_path)  # pyright: ignore[reportArgumentType]


_FOLDERS = ("openpalm", "huggingface", "mesh-transformer-jax")


def with_tokenizer(source: Source, spec: str) -> Source:
    """The source with another tokenizer: a tokenizer.json, a folder or a name on the Hub.

    Raises CheckpointError for a tokenizer with more ids than the vocabulary, DataError for one
    that cannot be read.
    """
    tokenizer = Tokenizer.from_spec(home(spec), ())
    if tokenizer.vocab_size > source.config.vocab_size:
        raise CheckpointError(
            f"--tokenizer {spec}: has {tokenizer.vocab_size} ids, more than the model's "
            f"{source.config.vocab_size}; give the one that it was trained with"
        )
    return replace(source, tokenizer_json=tokenizer.definition)


def detect(path: Path) -> SourceFormat | None:
    """The format of a folder; None for a file or a folder with one checkpoint file."""
    is_checkpoint = all((path / name).exists() for name in ("manifest.json", "config.json"))
    if is_checkpoint or (path / "checkpoints").is_dir():
        return "openpalm"
    if path.is_dir() and find_step(path) is not None:
        return "mesh-transformer-jax"
    if (path / "config.json").is_file():
        content = read_json(path / "config.json", "check the path")
        if "model_type" in content or "architectures" in content:
            return "huggingface"
    return None


def _refuse_config(config_path: Path | None, found: str) -> None:
    if config_path is not None:
        raise SettingsError(
            f"--config {config_path}: a checkpoint of {found} has its own; leave it out"
        )


def _openpalm(path: Path) -> Source:
    directory = checkpoint.resolve(path)
    configs = checkpoint.load_configs(directory)
    loaded = None
    if configs.lora is None and configs.reward is None:
        weights = LazyState.of_file(directory / WEIGHTS)
    else:
        loaded = checkpoint.load(directory)
        weights = in_memory(directory, loaded)
    manifest = read_manifest(directory)
    state = directory / "train/state.safetensors"
    optimizer = None
    # Another optimizer's state has the same names, but other meanings.
    if configs.lora is None and checkpoint.optimizer_name(directory) == "adamw":
        optimizer = LazyState.of_file(state, "optimizer/")
    return Source(
        format="openpalm",
        config=configs.model,
        weights=weights,
        loaded=loaded,
        found="an OpenPaLM checkpoint",
        lineage={"kind": "converted", "parent": manifest["sha256"], "openpalm": __version__},
        reward=configs.reward,
        optimizer=optimizer,
        step=_step(directory, manifest["lineage"]),
        tokenizer_json=checkpoint.tokenizer_json(directory),
        history=manifest["lineage"] | {"checkpoint": manifest["sha256"]},
        defaults=sampling_defaults(directory),
    )


def _step(directory: Path, lineage: dict[str, Any]) -> int:
    """The steps of training: a run's checkpoint is named by them, a converted one has them."""
    name = directory.name.removeprefix("step-")
    steps = lineage.get("step", 0)
    if name.isdecimal() and name != directory.name:
        return int(name)
    return steps if type(steps) is int and 0 <= steps < 1 << 31 else 0


def check_kind(path: Path) -> str:
    """The model_type of a Hugging Face folder. Raises CheckpointError for one that is not read."""
    kind = read_json(path / "config.json", "check the path", MAX_CONFIG_BYTES).get("model_type")
    if kind in ("gptj", MODEL_TYPE):
        return kind
    raise CheckpointError(
        f"{path}: a {shown(kind)} model; of Hugging Face's models OpenPaLM reads gptj (GPT-J) "
        f"and {MODEL_TYPE} (its own exports)"
    )


def _huggingface(path: Path) -> Source:
    kind = check_kind(path)
    reward, loaded = None, None
    if kind == "gptj":
        config, weights = huggingface.read_gptj(path)
    else:
        config, reward, weights = read_palm(path)
    name = {"gptj": "Hugging Face's GPT-J"}.get(kind, "an OpenPaLM export for Hugging Face")
    found = f"{name}, {str(weights.entries['embedding'].dtype)[6:]}"
    if reward is not None:
        with torch.device("meta"):
            loaded = make_model(config, reward).eval().requires_grad_(False)
        loaded.load_state_dict(dict(weights), assign=True)
        weights = in_memory(path, loaded)
    hashes = {
        file.name: sha256_of(file)
        for file in sorted(path.iterdir())
        # An index decides which of two files a tensor is taken from.
        if file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
    }
    return Source(
        format="huggingface",
        config=config,
        weights=weights,
        loaded=loaded,
        found=found,
        lineage=_lineage("huggingface", path, hashes),
        reward=reward,
        tokenizer_json=read_tokenizer(path),
        defaults=read_defaults(path),
    )


def _mesh(path: Path, config_path: Path | None) -> Source:
    mesh = read_mesh(path, config_path)
    return Source(
        format="mesh-transformer-jax",
        config=mesh.config,
        weights=mesh.weights,
        found=f"mesh-transformer-jax, {mesh.notes[0]}",
        notes=mesh.notes[1:],
        lineage=_lineage("mesh-transformer-jax", mesh.folder, mesh.checksums) | {"step": mesh.step},
        optimizer=mesh.moments,
        step=mesh.step,
    )


def _lineage(source: str, path: Path, sums: dict[str, str]) -> dict[str, Any]:
    """`sums`: a checksum of each file; their list is hashed, because a shard is no whole."""
    text = "".join(f"{name} {found}\n" for name, found in sorted(sums.items()))
    return {
        "kind": "converted",
        "source": source,
        "source_file": path.name,
        "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "openpalm": __version__,
        "torch": str(torch.__version__),
    }


def _of_state_dict(
    path: Path, project: Project | None, era: str | None, config_path: Path | None
) -> Source:
    foreign = read_foreign(path, project, era, config_path)
    model = foreign.model()
    return Source(
        format=foreign.project,
        config=foreign.config,
        weights=in_memory(foreign.file, model),
        loaded=model,
        found=f"{foreign.project}, era: {foreign.era} ({foreign.why})",
        notes=foreign.notes,
        lineage=foreign.lineage(),
        reward=foreign.reward,
    )


def in_memory(where: Path, model: Transformer) -> LazyState:
    def entry(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)

    parameters = lora.merged(model).published_parameters()
    return LazyState(where, {name: entry(tensor) for name, tensor in parameters})
