"""An adapter in a directory of its own, laid out as PEFT lays its out, out and in.

    adapter_config.json          rank, alpha and target names, among what PEFT wants to know
    adapter_model.safetensors    base_model.model.blocks.0.project_in.q.lora_A.weight [rank, in]
                                 base_model.model.blocks.0.project_in.q.lora_B.weight [out, rank]

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. Keys and values are targets of
their own, k and v. Nothing but safetensors is read.
"""

import json
import re
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from openpalm.errors import CheckpointError, SettingsError
from openpalm.json_file import read_json
from openpalm.model import lora
from openpalm.model.config import LORA_TARGETS, LoraConfig, lora_from_json
from openpalm.model.transformer import Transformer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(blocks\.\d+\.\w+)\.(\w+)\.lora_([AB])\.weight")
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"),
)
"""Variants of PEFT that compute something else: none may be set."""


def write(directory: Path, model: Transformer) -> None:
    """Makes the directory with the model's adapter in it."""
    config = lora.config_of(model)
    assert config is not None
    directory.mkdir()
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    text = json.dumps(content, indent=2) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    factors = {
        _foreign(name): factor.detach().cpu().contiguous()
        for name, factor in lora.adapter_parameters(model).items()
    }
    safetensors.torch.save_file(factors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: Transformer, directory: Path) -> None:
    """Attaches the adapter in `directory` to a model that has none.

    Raises CheckpointError where a file is missing or damaged, or is an adapter of another model.
    """
    if lora.is_attached(model):
        raise CheckpointError(
            f"{directory}: the model has an adapter already; fold it in with `openpalm merge-lora`"
        )
    values = read_json(directory / CONFIG_FILE, "an adapter is a directory that holds one")
    where = directory / WEIGHTS_FILE
    if not where.is_file():
        raise CheckpointError(f"{where}: is missing; other formats than safetensors are not read")
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            keys = list(file.keys())
            config = _config(values, keys, directory)
            config.check(model.config)
            shapes = _shapes(config, model)
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
            if odd := min((key for key, _ in stored.items() ^ shapes.items()), default=None):
                raise CheckpointError(
                    f"{directory}: an adapter of another model ({odd} is "
                    f"{_told(stored.get(odd))}, this model needs {_told(shapes.get(odd))})"
                )
            lora.attach(model, config)
            for name, factor in lora.adapter_parameters(model).items():
                factor.copy_(file.get_tensor(_foreign(name)))
    except SettingsError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{where}: cannot be read ({error})") from None


def _config(values: dict[str, Any], keys: list[str], directory: Path) -> LoraConfig:
    """Rank and alpha as the file says; the targets are those that have factors."""
    where = str(directory / CONFIG_FILE)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {values.get('peft_type')!r}: only LORA is read")
    for name in _UNSUPPORTED:
        if values.get(name):
            raise CheckpointError(f"{where}: {name} is set; only plain low-rank adapters are read")
    if values.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: bias {values['bias']!r}: only adapters without are read")
    found = [_KEY.fullmatch(key) for key in keys]
    names = {match[2] for match in found if match}
    if not names <= set(LORA_TARGETS) or not all(found):
        odd = next(k for k, m in zip(keys, found, strict=True) if not m or m[2] not in LORA_TARGETS)
        raise CheckpointError(f"{directory}: an adapter of another kind of model (holds {odd})")
    targets = [name for name in LORA_TARGETS if name in names]
    rank, alpha = values.get("r"), values.get("lora_alpha")
    try:
        return lora_from_json({"rank": rank, "alpha": alpha, "targets": targets}, where)
    except SettingsError:
        raise CheckpointError(
            f"{where}: r {rank!r} and lora_alpha {alpha!r}, with {len(keys)} factors beside it, "
            "make no adapter"
        ) from None


def _shapes(config: LoraConfig, model: Transformer) -> dict[str, tuple[int, int]]:
    """What the factors of such a model must be, by PEFT's names."""
    shapes = {}
    for layer in range(model.config.depth):
        for target in config.targets:
            rows, columns = model.config.matrices[target]
            side = "project_in" if target in lora.INPUTS else "project_out"
            name = f"blocks.{layer}.{side}.lora.{target}"
            shapes[_foreign(f"{name}.a")] = (config.rank, columns)
            shapes[_foreign(f"{name}.b")] = (rows, config.rank)
    return shapes


def _foreign(name: str) -> str:
    """PEFT's name of a factor: blocks.0.project_in.lora.q.a -> ...project_in.q.lora_A.weight."""
    place, _, factor = name.partition(".lora.")
    target, _, side = factor.partition(".")
    return f"base_model.model.{place}.{target}.lora_{side.upper()}.weight"


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
