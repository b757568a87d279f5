"""LoRA adapter directories in PEFT's layout: write, load, check that the base model fits.

    adapter_config.json          rank, alpha, target names and PEFT's other fields
    adapter_model.safetensors    base_model.model.blocks.0.project_in.q.lora_A.weight [rank, in]
                                 base_model.model.blocks.0.project_in.q.lora_B.weight [out, rank]

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint. Keys and values are separate
targets, k and v. Reads safetensors only.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpalm.base.json_file import read_json
from openpalm.checkpoint import tensors
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model import lora
from openpalm.model.config import LORA_TARGETS, LoraConfig, ModelConfig, lora_from_json
from openpalm.model.sharding import whole
from openpalm.model.transformer import Transformer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(blocks\.\d+\.\w+)\.(\w+)\.lora_([AB])\.weight")
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"),
)
"""Options of PEFT with other computations; an adapter that sets one is refused."""

_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""PEFT's init_lora_weights that do not change the base. eva chooses A by activations, with B zero.
Not among them: pissa, olora and corda subtract the initial factors from the base's weights, and
loftq quantizes the weights, so their factors fit only the changed weights."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def config_text(config: LoraConfig, base: str | None = None) -> str:
    """The text of adapter_config.json.

    base: the manifest hash of the checkpoint that the adapter was trained on. It is stored as
    PEFT's `revision`, "the specific base model version".
    """
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(content, indent=2) + "\n"


def factors(model: Transformer) -> dict[str, Tensor]:
    """The model's adapter by PEFT's names, whole; all processes of a sharded model must call it."""
    return {
        _peft_name(name): whole(factor).detach().cpu().contiguous()
        for name, factor in lora.adapter_parameters(model).items()
    }


@torch.no_grad()
def load_adapter(
    model: Transformer,
    directory: Path,
    *,
    bases: Collection[str] = (),
    made_for: str | None = None,
    allow: Callable[[str], None] | None = None,
) -> None:
    """Attaches the adapter in `directory` to a model without one; see `read_adapter`.

    Raises CheckpointError, also if the model has an adapter.
    """
    if lora.is_attached(model):
        raise CheckpointError(
            f"{directory}: the model has an adapter already; fold it in with `openpalm merge-lora`"
        )
    config, factors = read_adapter(
        model.config, directory, bases=bases, made_for=made_for, allow=allow
    )
    lora.attach(model, config)
    for name, factor in lora.adapter_parameters(model).items():
        factor.copy_(factors[name])


def read_adapter(
    model: ModelConfig,
    directory: Path,
    *,
    bases: Collection[str] = (),
    made_for: str | None = None,
    allow: Callable[[str], None] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config of the adapter in `directory`, and its factors by the names of `lora`.

    model: the config of the model that it is for.
    bases: manifest hashes of checkpoints with this model's weights.
    made_for: manifest hash of the checkpoint that the adapter was trained on; None reads it from
    the adapter's config.

    Raises CheckpointError if a file is missing or damaged, or the adapter's shapes fit another
    model. Also if the adapter was trained on other weights: on none of `bases`, or on weights that
    its initialisation changed. In this last case `allow`, if given, gets the message instead.
    """
    values = read_json(directory / CONFIG_FILE, "an adapter is a directory that holds one")
    where = directory / WEIGHTS_FILE
    if not where.is_file():
        raise CheckpointError(f"{where}: is missing; other formats than safetensors are not read")
    if misfit := _misfit(values, bases, made_for):
        if allow is None:
            raise CheckpointError(f"{directory}: {misfit}")
        allow(f"{directory}: {misfit}")
    try:
        with tensors.opened(where) as file:
            stored = file.shapes()
            config = _config(values, list(stored), directory)
            config.check(model)
            own = _shapes(config, model)
            shapes = {_peft_name(name): shape for name, shape in own.items()}
            if odd := min((key for key, _ in stored.items() ^ shapes.items()), default=None):
                raise CheckpointError(
                    f"{directory}: an adapter of another model ({odd} is "
                    f"{_shape_text(stored.get(odd))}, this model needs "
                    f"{_shape_text(shapes.get(odd))})"
                )
            factors = {name: file.finite(_peft_name(name)) for name in own}
    except SettingsError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return config, factors


def _misfit(values: dict[str, Any], bases: Collection[str], made_for: str | None) -> str | None:
    """Why the adapter does not fit these weights, or None if nothing contradicts it."""
    start = values.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        return (
            f"init_lora_weights {str(start)[:40]!r} can change the base's weights, which these are "
            "not; convert it with PEFT's save_pretrained(path_initial_model_for_weight_"
            "conversion=...)"
        )
    base = made_for or values.get("revision")
    if bases and isinstance(base, str) and _DIGEST.fullmatch(base) and base not in bases:
        return f"an adapter of another checkpoint (the hash of that one's manifest: {base[:12]}...)"
    return None


def _config(values: dict[str, Any], keys: list[str], directory: Path) -> LoraConfig:
    """Rank and alpha from the file; targets from the stored factors."""
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
            f"{where}: r {rank!r} and lora_alpha {alpha!r} and {len(keys)} stored factors "
            "do not make an adapter"
        ) from None


def _shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Expected shapes of the adapter's factors, by the names of `lora`."""
    shapes = {}
    for layer in range(model.depth):
        for target in config.targets:
            rows, columns = model.matrices[target]
            side = "project_in" if target in lora.INPUTS else "project_out"
            name = f"blocks.{layer}.{side}.lora.{target}"
            shapes[f"{name}.a"] = (config.rank, columns)
            shapes[f"{name}.b"] = (rows, config.rank)
    return shapes


def _peft_name(name: str) -> str:
    """PEFT's name of a factor: blocks.0.project_in.lora.q.a -> ...project_in.q.lora_A.weight."""
    place, _, factor = name.partition(".lora.")
    target, _, side = factor.partition(".")
    return f"base_model.model.{place}.{target}.lora_{side.upper()}.weight"


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
