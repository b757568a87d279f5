"""Adapters that have learned something, as models and as directories."""

import copy
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from openpalm.checkpoint import adapter as files
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.model import lora
from openpalm.model.config import LORA_TARGETS, LoraConfig
from openpalm.model.transformer import Transformer

ALL = LoraConfig(4, 8.0, LORA_TARGETS)
QV = LoraConfig(2, 32.0, ("q", "v"))
CONFIGS = [ALL, QV, LoraConfig(7, 28.0, ("k", "up", "down")), LoraConfig(1, 60.0, ("out",))]


def adapted(config: LoraConfig, seed: int, model: Transformer) -> Transformer:
    """A copy of the model with an adapter on those of the targets that the model has."""
    model = copy.deepcopy(model)
    targets = tuple(target for target in config.targets if target in model.config.matrices)
    lora.attach(model, replace(config, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in lora.adapter_parameters(model).items():
            if name.endswith(".b"):
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return model


def write_adapter(path: Path, base: Path, config: LoraConfig, seed: int) -> Transformer:
    """Writes an adapter of checkpoint `base` to the directory; returns the model with it."""
    model = adapted(config, seed, checkpoint.load(base))
    own = lora.config_of(model)
    assert own is not None
    path.mkdir()
    text = files.config_text(own, read_manifest(base)["sha256"])
    (path / files.CONFIG_FILE).write_text(text, encoding="utf-8")
    safetensors.torch.save_file(files.factors(model), path / files.WEIGHTS_FILE)
    return model
