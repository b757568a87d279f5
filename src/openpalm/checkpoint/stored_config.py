"""Reads config.json of a checkpoint, and compares it with the names and shapes of the weights."""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from openpalm import __version__
from openpalm.base.console import shown
from openpalm.base.json_file import read_json
from openpalm.base.run_version import version_in
from openpalm.checkpoint import tensors
from openpalm.checkpoint.manifest import FORMAT, REMEDY, VERSION, WEIGHTS
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model import lora
from openpalm.model.config import (
    LoraConfig,
    ModelConfig,
    RewardConfig,
    config_from_json,
    lora_from_json,
    reward_from_json,
)
from openpalm.model.reward import make_model


class Configs(NamedTuple):
    """The three parts of config.json; lora and reward are None without adapter or reward heads."""

    model: ModelConfig
    lora: LoraConfig | None
    reward: RewardConfig | None


def load_configs(directory: Path) -> Configs:
    """The checked parts of config.json; reads no weights."""
    where = directory / "config.json"
    content = read_json(where, REMEDY)
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(f"{where}: not a config.json of this version; see `openpalm convert`")
    try:
        config = config_from_json(content.get("model"), str(where))
        low_rank = lora_from_json(content["lora"], str(where)) if "lora" in content else None
        if low_rank is not None:
            low_rank.check(config)
        reward = reward_from_json(content["reward"], str(where)) if "reward" in content else None
    except SettingsError as error:
        raise _of_other_version(where, str(error).removeprefix(f"{where}: ")) from None
    configs = Configs(config, low_rank, reward)
    _check_tensors(configs, directory)
    return configs


def _of_other_version(where: Path, reason: str) -> CheckpointError:
    """The error for a config.json that is not valid, with both versions if they differ."""
    version = version_in(where.parent / "manifest.json")
    if version in (None, __version__):
        return CheckpointError(f"{where}: {reason}; {REMEDY}")
    return CheckpointError(
        f"{where}: was written by OpenPaLM {shown(version)}, and this is {__version__} ({reason}); "
        f"install that version, or {REMEDY}"
    )


def _check_tensors(configs: Configs, directory: Path) -> None:
    """Compares stored names and shapes with the config.

    Before any memory is allocated, so that a hostile config cannot make the process build a huge
    model.
    """
    config, low_rank = configs.model, configs.lora
    where = directory / WEIGHTS
    with tensors.opened(where) as file:
        stored = file.shapes()
    numbers = sum(math.prod(shape) for shape in stored.values())
    parameters = config.parameters + (low_rank.parameters(config) if low_rank else 0)
    if config.depth > len(stored) or parameters > numbers:
        raise CheckpointError(
            f"{where}: holds {len(stored)} tensors of {numbers:,} numbers, too few for its "
            f"config.json ({config.depth} blocks, {parameters:,} parameters)"
        )
    with torch.device("meta"):
        model = make_model(config, configs.reward)
        if low_rank is not None:
            lora.attach(model, low_rank)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    odd = {name for name, _ in stored.items() ^ wanted.items()}
    if odd:
        raise CheckpointError(f"{where}: a checkpoint of another model (differs in {min(odd)})")
