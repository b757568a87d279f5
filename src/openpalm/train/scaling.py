"""`--depth N`: what else a run needs, from one number by rules. Knows no data and no clock.

Shape: PaLM's block, 64 of width a block deep (within wide bounds the ratio hardly matters: Kaplan
et al. 2020, section 3.2), heads of 64 that fill the width, one key/value head, feed-forward four
times the width, 128 tokens of context a block rounded up to a power of two, 256 to 2048, as in
our presets.

Length: D = 20 tokens a parameter (Hoffmann et al. 2022).

Batch, in tokens: B = 2048 (D / 2^19)^0.383. The exponent is Bergsma et al.'s (2025, Power Lines),
who find it free of the model's size; the constant is ours.
"""

import math
from dataclasses import replace
from typing import Any

from openpalm.model.config import ModelConfig, Preset
from openpalm.train.config import Ramp, TrainSettings

HEAD_DIM = 64
CONTEXT_A_BLOCK, LEAST_CONTEXT, MOST_CONTEXT = 128, 256, 2048
TOKENS_A_PARAMETER = 20

BATCH, BATCH_POWER = 2048, 0.383
RATES = {"muon": 0.06, "adamw": 0.006}
MUON_RATE = 0.04
RATE_BATCH_POWER, RATE_TOKENS_POWER = 0.5, -0.3
FITTED_AT = 2**19
"""Tokens of the runs that the constants above are of."""
TIMESCALE = 1.084 * TOKENS_A_PARAMETER**-0.527
MOST_DECAY = 0.5


def of_depth(depth: int) -> Preset:
    """The model of that depth; its vocabulary and learning rate are not settled yet."""
    dim = HEAD_DIM * depth
    context = 1 << (CONTEXT_A_BLOCK * depth - 1).bit_length()
    config = ModelConfig(
        vocab_size=1,
        dim=dim,
        depth=depth,
        heads=depth,
        head_dim=HEAD_DIM,
        ff_dim=4 * dim,
        context=min(MOST_CONTEXT, max(LEAST_CONTEXT, context)),
    )
    return Preset(config, RATES["adamw"], "of --depth")


def scaled(settings: TrainSettings, vocab_size: int) -> tuple[TrainSettings, dict[str, Any]]:
    """The settings with what --depth derives for such a vocabulary, and that, by option.

    What is set already stays, and what follows from it follows from that.
    """
    assert settings.depth is not None
    arch, optim = settings.arch, settings.optim
    values: dict[str, Any] = {}

    def derive(name: str, given: Any, value: Any) -> Any:
        if given is None:
            values[name] = given = float(f"{value:.3g}") if isinstance(value, float) else value
        return given

    config = replace(of_depth(settings.depth).config, vocab_size=vocab_size)
    sizes = ("dim", "heads", "head_dim", "ff_dim", "kv_heads")
    own = {
        name: derive(f"arch.{name}", getattr(arch, name), getattr(config, name)) for name in sizes
    }
    config = replace(config, **own)
    tokens = TOKENS_A_PARAMETER * config.parameters
    length = derive("sequence_length", settings.sequence_length, config.context)
    whole = 2 ** round(math.log2(BATCH * (tokens / FITTED_AT) ** BATCH_POWER / length))
    batch = derive("batch_tokens", settings.batch_tokens, length * max(1, whole))
    steps = math.ceil(tokens / batch / Ramp.parse(settings.batch_ramp).mean)
    if not settings.lengths:
        derive("steps", None, steps)

    name = derive("optim.name", optim.name, "muon")
    optim = replace(optim, name=name)
    factor = (batch / BATCH) ** RATE_BATCH_POWER * (tokens / FITTED_AT) ** RATE_TOKENS_POWER
    rate = RATES.get(name, RATES["adamw"]) * factor
    lr = derive("optim.lr", optim.lr, optim.peak(rate, config.dim))
    if name == "muon":
        lr = derive("optim.muon_lr", optim.muon_lr, MUON_RATE * factor)
    if optim.rule == "fixed":
        decay = min(MOST_DECAY, 1 / (TIMESCALE * lr * steps))
        derive("optim.weight_decay", optim.weight_decay, decay)
    return _with(settings, values), values


def _with(settings: TrainSettings, values: dict[str, Any]) -> TrainSettings:
    """The settings with values at dotted names."""
    parts: dict[str, dict[str, Any]] = {"": {}, "arch": {}, "optim": {}}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        parts[part][field] = value
    optim = replace(settings.optim, **parts["optim"]).resolved()
    return replace(settings, arch=replace(settings.arch, **parts["arch"]), optim=optim, **parts[""])
