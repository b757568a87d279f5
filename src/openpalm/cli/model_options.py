"""Options that several verbs share: how a model is loaded and how its tokens are sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from openpalm.base.settings import check_field


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a checkpoint is read."""

    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU if there is one"""
    quantize: Literal["int8", "int4"] | None = None
    """store weight matrices in 8 or 4 bits: faster on a CPU, slightly less accurate, computes in
    bfloat16"""
    verify: bool = False
    """check every file of the checkpoint against its manifest, the optimizer state included"""


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions(LoadOptions):
    """How a model is loaded to generate text, without an adapter."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """data type of weights and arithmetic; auto is bfloat16 if the processor supports it, else
    float32"""
    tokenizer: Path | None = None
    """tokenizer.json for a checkpoint without one"""
    force: bool = False
    """use a tokenizer or an adapter that was made for another checkpoint"""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BaseModelOptions):
    """How a model is loaded to generate text."""

    adapter: Path | None = None
    """LoRA adapter for the model: a directory in PEFT's layout (adapter_config.json and
    adapter_model.safetensors), a run or a checkpoint"""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(ModelOptions):
    """How a model is loaded and its tokens are sampled."""

    temperature: float | None = None
    """sampling temperature, 0 is greedy; default: the model's own, else 0.8"""
    top_k: int | None = None
    """sample from the k most likely tokens, 0 is all; default: the model's own, else all"""
    top_p: float | None = None
    """sample from the most likely tokens with this total probability; default: the model's own,
    else 1"""
    seed: int = 0
    """random seed"""


def check_sampling(settings: Any) -> None:
    """Raises SettingsError for a temperature or a seed that no completion can be sampled with."""
    check_field(settings, "temperature", lambda v: 0 < v <= 100, "in (0, 100]")
    check_field(settings, "seed", lambda v: -(2**63) <= v < 2**63, "a 64-bit whole number")
