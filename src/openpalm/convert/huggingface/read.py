"""Reads a folder with an exported PaLM back into our model; nothing in it is executed.

Reads config.json, generation_config.json, the safetensors files and the tokenizer's files. The
modelling file and everything else in the folder is ignored.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openpalm import __version__
from openpalm.base.hashing import sha256_of
from openpalm.base.json_file import read_json
from openpalm.checkpoint import directory as checkpoint
from openpalm.convert.huggingface import weights
from openpalm.convert.huggingface.card import sampling_header
from openpalm.convert.huggingface.names import configs_from_json, parts_of
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, DataError, SettingsError
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel, make_model
from openpalm.model.transformer import Transformer

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 1 << 20
_REMEDY = "check the path; the model's folder holds one"


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder holds."""

    model: Transformer
    """in eval mode, in the dtype of the file"""
    tokenizer_json: str | None
    defaults: SamplingDefaults
    lineage: dict[str, Any]


def read_palm(folder: Path) -> HuggingFaceModel:
    """The model in a folder that `save_as_huggingface` or `save_pretrained` wrote.

    Raises CheckpointError with the file, the fault and the remedy.
    """
    where = str(folder / CONFIG_FILE)
    content = read_json(folder / CONFIG_FILE, _REMEDY, MAX_CONFIG_BYTES)
    try:
        config, reward = configs_from_json(content, where)
    except SettingsError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    return HuggingFaceModel(
        _read_model(folder, config, reward),
        read_tokenizer(folder),
        read_defaults(folder),
        {
            "kind": "converted",
            "source": "huggingface",
            "source_sha256": folder_digest(folder),
            "openpalm": __version__,
            "torch": str(torch.__version__),
        },
    )


def write_checkpoint(folder: Path, directory: Path) -> None:
    """Writes the model in `folder` as our checkpoint, in the dtype of the file."""
    read = read_palm(folder)
    reward = read.model.reward if isinstance(read.model, RewardModel) else None
    card = checkpoint.default_card(read.model.config, reward)
    checkpoint.save(
        directory,
        read.model,
        tokenizer_json=read.tokenizer_json,
        lineage=read.lineage,
        # Loaded in float32, weights of 16 bits compute other logits than they do in 16 bits.
        fingerprint=read.model.embedding.dtype == torch.float32,
        card=sampling_header(read.defaults) + card,
    )


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and hashes of the files that are read. Raises CheckpointError."""
    names = [CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES, weights.INDEX]
    found = [folder / name for name in names if (folder / name).is_file()]
    found += sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    lines = [f"{path.name} {sha256_of(path)}\n" for path in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def read_tokenizer(folder: Path) -> str | None:
    """The folder's tokenizer.json, with the end-of-text token that its other files name."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer.from_spec(str(folder), ()).definition
    except DataError as error:
        raise CheckpointError(str(error)) from None


def read_defaults(folder: Path) -> SamplingDefaults:
    """Sampling settings in generation_config.json; `do_sample: false` is temperature 0."""
    where = folder / "generation_config.json"
    if not where.is_file():
        return SamplingDefaults()
    if read_json(where, _REMEDY, MAX_CONFIG_BYTES).get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    return sampling_defaults(folder)


@torch.no_grad()
def _read_model(folder: Path, config: ModelConfig, reward: RewardConfig | None) -> Transformer:
    with weights.opened(folder) as stored:
        # Before any memory is allocated: a hostile config must not make a huge model.
        least = config.parameters - (config.vocab_size if config.bias else 0)
        if config.depth > len(stored.stored) or least > stored.numbers:
            raise CheckpointError(
                f"{folder}: holds {len(stored.stored)} tensors of {stored.numbers:,} numbers, too "
                f"few for its config.json ({config.depth} blocks, {config.parameters:,} parameters)"
            )
        with torch.device("meta"):
            model = make_model(config, reward).to(stored.dtype)
        stored.check(_expected(model, config, reward))
        model = model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            parameter.zero_()  # padding rows of the vocabulary, and what rewards do not use
            for part in parts_of(name, config, reward=reward is not None):
                parameter[part.rows].copy_(stored.read(part.name))
    return model.eval().requires_grad_(False)


def _expected(
    model: Transformer, config: ModelConfig, reward: RewardConfig | None
) -> dict[str, tuple[int, ...]]:
    return {
        part.name: tuple(parameter[part.rows].shape)
        for name, parameter in model.named_parameters()
        for part in parts_of(name, config, reward=reward is not None)
    }
