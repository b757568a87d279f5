"""`openpalm models`: lists the model presets with parameters, memory and FLOPs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from openpalm.base.settings import parse

if TYPE_CHECKING:
    from openpalm.model.config import ModelConfig, Preset

TRAIN_BYTES_PER_PARAMETER = 16
"""float32 weight, gradient and AdamW's two moments; activations need more memory."""

COLUMNS = (
    "model",
    "parameters",
    "dim x depth",
    "heads",
    "context",
    "serve bf16",
    "train",
    "FLOPs/token",
    "about",
)


@dataclass(frozen=True)
class ModelsSettings:
    """The output format."""

    json: bool = False
    """print JSON, with every size of each config"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ModelsSettings,
        argv,
        verb="models",
        about="Lists the model presets: parameters, memory to serve in bfloat16 and to train with "
        "AdamW in float32, training FLOPs per token at the preset's context.",
        examples=["openpalm models", "openpalm models --json"],
    )
    from openpalm.model.config import PRESETS

    if settings.json:
        print(json.dumps([_row(name, PRESETS[name].config) for name in PRESETS], indent=1))
        return
    lines = [COLUMNS, *(_line(name, preset) for name, preset in PRESETS.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _line(name: str, preset: "Preset") -> tuple[str, ...]:
    config = preset.config
    return (
        name,
        f"{config.parameters:,}",
        f"{config.dim} x {config.depth}",
        f"{config.heads} x {config.head_dim}",
        str(config.context),
        _size(2 * config.parameters),
        _size(TRAIN_BYTES_PER_PARAMETER * config.parameters),
        f"{config.flops_per_token():.2e}",
        preset.about,
    )


def _row(name: str, config: "ModelConfig") -> dict[str, object]:
    return {
        "name": name,
        "parameters": config.parameters,
        "serve_bytes_bfloat16": 2 * config.parameters,
        "train_bytes": TRAIN_BYTES_PER_PARAMETER * config.parameters,
        "kv_cache_bytes_per_token": config.kv_bytes_per_token(),
        "flops_per_token": config.flops_per_token(),
        "config": asdict(config),
    }


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:  # else three digits would round to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
