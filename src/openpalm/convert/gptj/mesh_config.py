"""Reads a configuration of mesh-transformer-jax (its configs/*.json) as settings of `train`.

The model is GPT-J's: the preset gpt-j-6b with other sizes. What its code fixes (optimizer, z-loss,
clipping) becomes a setting too; what has no counterpart is printed in a line.
"""

import importlib.util
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpalm.base.settings import spell
from openpalm.errors import SettingsError

MAX_BYTES = 1 << 20
_OF_ITS_KIND = {"layers", "d_model", "n_heads", "cores_per_replica", "per_replica_batch"}
_MODEL = ("layers", "d_model", "n_heads", "norm", "pe", "pe_rotary_dims", "seq")
_BATCH = ("tpu_size", "cores_per_replica", "per_replica_batch", "gradient_accumulation_steps")
_RATE = ("warmup_steps", "anneal_steps", "lr", "end_lr", "weight_decay", "total_steps")
_CADENCE = {"val_every": "eval_every", "ckpt_every": "save_every", "keep_every": "keep_every"}
_LOGGER = ("wandb_project", "name")
PROJECT = "mesh-transformer-jax"
"""the project of a configuration that names none"""
FIXED = {
    "optim.name": "adamw",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.clip": 1.0,
    "z_loss": 1e-4,
}
"""what the code of mesh-transformer-jax fixes"""
_UNUSED = {
    "n_vocab": "the tokenizer of the data decides",
    "bucket": "the run is on this machine",
    "train_set": "prepare it: openpalm data prepare data/{value} --tokenizer gpt2 --out DIR, then "
    "--data DIR",
    "val_set": "the validation split of --data is used",
    "val_batches": "the whole validation split is used",
    "eval_harness_tasks": "openpalm eval scores tasks",
    "comment": "a note",
}


@dataclass(frozen=True)
class MeshConfig:
    """Settings by their dotted names, and lines that tell what was read, derived and assumed."""

    values: dict[str, Any]
    lines: list[str]


def read_mesh_config(path: Path, fields: Collection[str]) -> MeshConfig | None:
    """The settings of a configuration, None for a file of another kind.

    `fields` are the names of the settings that `train` has. Raises SettingsError for a model or a
    value that is not supported.
    """
    content = _object(path)
    if content is None or not content.keys() >= _OF_ITS_KIND:
        return None
    reader = _Reader(str(path), content)
    values = _model(reader) | _batch(reader) | _rate(reader) | FIXED
    fixed = " ".join(f"{spell(name)} {value}" for name, value in FIXED.items())
    reader.say(f"assumed, as its code has it: {fixed}")
    values |= _cadence(reader, fields) | _logger(reader)
    if "model_dir" in content:
        values["out"] = reader.text("model_dir")
        reader.say(f"model_dir: --out {values['out']}, unless another is given")
    _tell_unused(reader, {key for key, name in _CADENCE.items() if name in fields})
    return MeshConfig(values, reader.lines)


@dataclass(frozen=True)
class _Reader:
    """The values of a file, checked when they are read."""

    where: str
    content: dict[str, Any]
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def whole(self, name: str, *, least: int = 1, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.wrong(name, f"must be a whole number, {least} or more")
        return value

    def number(self, name: str) -> float:
        value = self._get(name, None)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.wrong(name, "must be a number, 0 or more")
        return float(value)

    def text(self, name: str) -> str:
        value = self.content.get(name)
        if not isinstance(value, str) or not value or len(value) > 200:
            raise self.wrong(name, "must be a text of up to 200 characters")
        return value

    def wrong(self, name: str, reason: str) -> SettingsError:
        value = f"{self.content[name]!r:.100}:" if name in self.content else "is missing; it"
        return SettingsError(f"--config {self.where}: {name} {value} {reason}")

    def became(self, names: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
        """Tells which keys became which settings; returns the settings."""
        read = " ".join(f"{name} {self.content[name]}" for name in names if name in self.content)
        options = (
            f"{spell(name)} {value:g}" if isinstance(value, float) else f"{spell(name)} {value}"
            for name, value in values.items()
        )
        self.say(f"{read} -> {' '.join(options)}")
        return values

    def _get(self, name: str, default: Any) -> Any:
        return self.content.get(name, default)


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None for a file of another kind, which its own reader judges."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _model(reader: _Reader) -> dict[str, Any]:
    for name, wanted in (("norm", "layernorm"), ("pe", "rotary")):
        if reader.content.get(name) != wanted:
            raise reader.wrong(name, f"only {wanted} is supported; GPT-J has it")
    depth, dim, heads = (reader.whole(name) for name in ("layers", "d_model", "n_heads"))
    if dim % heads:
        raise reader.wrong("d_model", f"must be a multiple of n_heads ({heads})")
    head_dim = dim // heads
    rotated = reader.whole("pe_rotary_dims", default=head_dim)
    if rotated > head_dim or rotated % 2:
        wanted = f"must be even and at most d_model / n_heads ({head_dim})"
        raise reader.wrong("pe_rotary_dims", wanted)
    if "pe_rotary_dims" not in reader.content:
        reader.say(f"no pe_rotary_dims: all {head_dim} dimensions of a head are rotated")
    values = {
        "model": "gpt-j-6b",
        "arch.dim": dim,
        "arch.depth": depth,
        "arch.heads": heads,
        "arch.kv_heads": heads,
        "arch.head_dim": head_dim,
        "arch.ff_dim": 4 * dim,
        "arch.rotary_dims": rotated,
        "sequence_length": reader.whole("seq"),
    }
    return reader.became(_MODEL, values)


def _batch(reader: _Reader) -> dict[str, Any]:
    """Sequences of a step: the replicas on the TPU, times their batches, times the accumulation."""
    cores, batch = (reader.whole(name) for name in ("cores_per_replica", "per_replica_batch"))
    accumulated = reader.whole("gradient_accumulation_steps", default=1)
    size = reader.whole("tpu_size", default=cores)
    if "tpu_size" not in reader.content:
        reader.say(f"no tpu_size: one replica is assumed ({cores} cores)")
    sequences = batch * size // cores * accumulated
    if not sequences:
        raise reader.wrong("tpu_size", f"must be at least cores_per_replica ({cores})")
    return reader.became(_BATCH, {"batch_tokens": sequences * reader.whole("seq")})


def _rate(reader: _Reader) -> dict[str, Any]:
    """Warm-up and cosine are shares of the steps here, steps there."""
    if reader.content.get("step_shift"):
        raise reader.wrong("step_shift", "is not supported; leave it out")
    steps, anneal = reader.whole("total_steps"), reader.whole("anneal_steps")
    warmup = reader.whole("warmup_steps", least=0)
    rate, last = reader.number("lr"), reader.number("end_lr")
    if not rate or last > rate:
        raise reader.wrong("lr", "must be above 0 and at least end_lr")
    if warmup > steps:
        raise reader.wrong("warmup_steps", f"must be at most total_steps ({steps})")
    values = {
        "steps": steps,
        "optim.schedule": "cosine",
        "optim.warmup": warmup / steps,
        "optim.anneal": anneal / steps,
        "optim.lr": rate,
        "optim.final_lr": last / rate,
        "optim.weight_decay": reader.number("weight_decay"),
    }
    return reader.became(_RATE, values)


def _cadence(reader: _Reader, fields: Collection[str]) -> dict[str, Any]:
    found = {
        key: name for key, name in _CADENCE.items() if key in reader.content and name in fields
    }
    values = {name: reader.whole(key) for key, name in found.items()}
    return reader.became([*found], values) if found else {}


def _logger(reader: _Reader) -> dict[str, Any]:
    """Weights & Biases, if it is installed."""
    named = [name for name in _LOGGER if reader.content.get(name)]
    if not named:
        return {}
    if importlib.util.find_spec("wandb") is None:
        reader.say(
            f"{', '.join(named)}: not used, wandb is not installed; pip install "
            "'openpalm[logging]', then --loggers wandb"
        )
        return {}
    values: dict[str, Any] = {"loggers": "wandb", "wandb_project": PROJECT}
    for key, name in zip(_LOGGER, ("wandb_project", "wandb_name"), strict=True):
        if key in named:
            values[name] = reader.text(key)
    return reader.became(named, values)


def _tell_unused(reader: _Reader, cadence: set[str]) -> None:
    used = {*_MODEL, *_BATCH, *_RATE, *cadence, *_LOGGER, "model_dir", "step_shift"}
    for name, value in reader.content.items():
        if name not in used and value not in ("", [], {}):
            reason = _UNUSED.get(name, "has no counterpart").format(value=value)
            reader.say(f"{name} {value!s:.100}: not used; {reason}")
