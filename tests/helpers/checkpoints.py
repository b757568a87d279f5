"""A small model, its training state and the files of its checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.directory import TrainState
from openpalm.checkpoint.manifest import manifest_text, write_manifest
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

CONFIG = ModelConfig(
    vocab_size=80, dim=16, depth=2, heads=2, head_dim=8, ff_dim=32, kv_heads=1, context=16
)


TOKENIZER = '{"any": "text of a tokenizer"}'


def made(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    return model.eval()


def state() -> TrainState:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "optimizer/a.weight/exp_avg": torch.randn(7, 5, generator=generator),
        "optimizer/a.weight/step": torch.tensor(12.0),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "random/cpu": torch.get_rng_state(),
        "empty": torch.empty(0),
    }
    return TrainState(tensors, {"step": 12, "loader": {"rows_consumed": 96, "sample": "é\u2028"}})


def save(directory: Path, model: Transformer | None = None, **more: Any) -> Path:
    options: dict[str, Any] = {
        "tokenizer_json": TOKENIZER,
        "train": state(),
        "lineage": {"step": 12, "parent": None, "why": "é"},
        "fingerprint": True,
    }
    checkpoint.save(directory, model or made(), **options | more)
    return directory


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """Makes the manifest agree with the files again, as somebody who means harm would."""
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    lineage = manifest["lineage"]
    (directory / "manifest.json").unlink()
    write_manifest(directory, lineage)
    if changes:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        body = {key: value for key, value in manifest.items() if key != "sha256"} | changes
        text = manifest_text(body)
        (directory / "manifest.json").write_text(text, encoding="utf-8")


FILES = [
    "card.md",
    "config.json",
    "fingerprint.safetensors",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "train/state.json",
    "train/state.safetensors",
]


def refused(directory: Path, file: str = "") -> str:
    """What the reader of `file` says when it refuses, which names the directory and the file."""
    read = checkpoint.load_train_state if file.startswith("train/") else openpalm.load
    with pytest.raises(CheckpointError) as caught:
        read(directory)
    message = str(caught.value)
    assert str(directory) in message
    assert file in message
    assert len(message.splitlines()) == 1
    return message
