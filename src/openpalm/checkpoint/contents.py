"""What a checkpoint directory holds, collected in memory before it is written."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from openpalm import __version__
from openpalm.base.files import atomic_folder
from openpalm.checkpoint import adapter, fingerprint, tensors
from openpalm.checkpoint.manifest import FORMAT, VERSION, WEIGHTS, write_manifest
from openpalm.errors import StorageError
from openpalm.model import lora
from openpalm.model.config import LoraConfig, ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer

STATE = ("train/state.safetensors", "train/state.json")


@dataclass(frozen=True)
class TrainState:
    """Everything that resuming a run needs, except the published weights."""

    tensors: Mapping[str, Tensor]
    values: dict[str, Any]
    """values that JSON can hold"""


@dataclass(frozen=True)
class Contents:
    """Files of a checkpoint by their names in it, without the manifest."""

    texts: dict[str, str] = field(default_factory=dict)
    small: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """safetensors files whose tensors every process has"""
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    """metadata of `small` files"""
    large: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """safetensors files whose tensors may be sharded over processes"""

    def write_small(self, folder: Path) -> None:
        """Writes everything but the `large` files."""
        for name, text in self.texts.items():
            _parent(folder / name).write_text(text, encoding="utf-8")
        for name, stored in self.small.items():
            tensors.write(_parent(folder / name), stored, self.metadata.get(name))

    def write(self, folder: Path) -> None:
        """Writes everything; for one process, which has every tensor whole."""
        self.write_small(folder)
        for name, stored in self.large.items():
            tensors.write(_parent(folder / name), stored)


def _parent(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def collect(
    model: Transformer,
    *,
    tokenizer_json: str | None = None,
    train: TrainState | None = None,
    with_fingerprint: bool = False,
    card: str | None = None,
    parent: str | None = None,
) -> Contents:
    """The contents of a checkpoint of the model; if it is sharded all processes must call it.

    parent: hash of the checkpoint that the run started from. The tensors are those of the model:
    a later step changes them.
    """
    low_rank = lora.config_of(model)
    reward = model.reward if isinstance(model, RewardModel) else None
    contents = Contents({"config.json": config_text(model.config, low_rank, reward)})
    if low_rank is not None:
        contents.texts[f"adapter/{adapter.CONFIG_FILE}"] = adapter.config_text(low_rank, parent)
        weights = f"adapter/{adapter.WEIGHTS_FILE}"
        contents.small[weights], contents.metadata[weights] = (
            adapter.factors(model),
            {"format": "pt"},
        )
    contents.large[WEIGHTS] = dict(model.published_parameters())
    if tokenizer_json is not None:
        contents.texts["tokenizer.json"] = tokenizer_json
    if with_fingerprint:
        tokens, logits = fingerprint.compute(model)
        contents.small[fingerprint.FILE] = {"tokens": tokens, "logits": logits}
    if train is not None:
        contents.large[STATE[0]] = train.tensors
        contents.texts[STATE[1]] = json.dumps(train.values, indent=1) + "\n"
    contents.texts["card.md"] = card or default_card(model.config, reward)
    return contents


def config_text(
    model: ModelConfig, low_rank: LoraConfig | None = None, reward: RewardConfig | None = None
) -> str:
    """The text of config.json."""
    content = {"format": FORMAT, "version": VERSION, "model": asdict(model)}
    parts = {"lora": low_rank, "reward": reward}
    content |= {name: asdict(part) for name, part in parts.items() if part is not None}
    return json.dumps(content, indent=2) + "\n"


def default_card(config: ModelConfig, reward: RewardConfig | None = None) -> str:
    """A model card with the facts that the config gives."""
    what = "PaLM-style language model" if reward is None else f"{reward.kind} reward model"
    return (
        "# Model card\n\n"
        f"A {what} of {config.parameters:,} parameters made with OpenPaLM "
        f"{__version__}.\n\n"
        f"| | |\n|---|---|\n| width x depth | {config.dim} x {config.depth} |\n"
        f"| heads | {config.heads} of {config.head_dim}, {config.kv_heads} key/value |\n"
        f"| context | {config.context} tokens |\n| vocabulary | {config.vocab_size} |\n\n"
        "Where it came from is in manifest.json under `lineage`.\n"
        "It repeats what its data says, true or not; look at its answers before relying on one.\n"
    )


@contextmanager
def complete_or_absent(directory: Path, lineage: dict[str, Any] | None) -> Iterator[Path]:
    """A folder that becomes the checkpoint `directory` at the end, when its manifest is written.

    Raises StorageError when the disk is full or refuses; then nothing new is left behind.
    """
    try:
        with atomic_folder(directory) as partial:
            yield partial
            write_manifest(partial, lineage or {})
    except BaseException as error:
        if refused := tensors.refusal(error):
            raise StorageError(f"{directory}: cannot be saved ({refused})") from error
        raise
