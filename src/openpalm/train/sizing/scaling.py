"""Scaling rules of `--depth N`: sizes, batch, learning rates, weight decay and steps from N.

Shape: PaLM's block. The width is 64 per block (within wide bounds the ratio hardly matters: Kaplan
et al. 2020, section 3.2), heads of 64, one key/value head, feed-forward four times the width. The
context is 128 tokens per block, rounded up to a power of two between 256 and 2048.

Length: D = 20 N tokens for N parameters (Hoffmann et al. 2022), or --epochs. With --steps the
batch is that of 20 N.

Batch, in tokens: B = 1130 (D / 2^19)^0.383, rounded to a power of two of sequences. The constant
is from our runs; the exponent is from Bergsma et al. (2025, Power Lines), who find that it does
not depend on the model size.

Optimizer: muon, which beats adamw by 0.13 nats per token at depth 2. The peak learning rates of
muon's matrices and of the rest (mostly the embedding), with the same exponents of B and D:

    muon_lr = 0.033 (dim / 128)^-0.42 (B / 2048)^0.51 (D / 2^19)^-0.38
    lr      = 0.038 (dim / 128)^-0.67 (B / 2048)^0.51 (D / 2^19)^-0.38

Fitted on runs of 0.13M to 4.1M parameters, batches of 512 to 4096 tokens and lengths of 2^17 to
2^20 tokens (benchmarks/scaling.py); larger sizes are extrapolated. Without muon, adamw's constant
is 0.006 instead of 0.038, measured at depth 2 only.

Weight decay: 1 / (tau lr steps) with tau = 1.08 (D / N)^-0.527. The weights average their updates
over a share tau of the run (Wang and Aitchison 2024); the exponent is Bergsma et al.'s, and the
constant gives our runs the 0.1 they had.
"""

import math
from dataclasses import replace
from typing import Any

from openpalm.model.config import ModelConfig, Preset
from openpalm.train.batch_shape import Ramp
from openpalm.train.config import PretrainSettings

HEAD_DIM = 64
CONTEXT_PER_BLOCK, LEAST_CONTEXT, MOST_CONTEXT = 128, 256, 2048
TOKENS_PER_PARAMETER = 20

FITTED_DIM, FITTED_BATCH, FITTED_TOKENS = 128, 2048, 2**19
"""The run at which the powers in the rules are 1."""
BEST_BATCH, BATCH_POWER = 1130, 0.383
MUON_RATE, MUON_DIM_POWER = 0.033, -0.42
REST_RATE, ADAMW_RATE, DIM_POWER = 0.038, 0.006, -0.67
RATE_BATCH_POWER, RATE_TOKENS_POWER = 0.51, -0.38
TIMESCALE, TIMESCALE_POWER = 1.08, -0.527
MOST_DECAY = 0.5


def of_depth(depth: int) -> Preset:
    """The sizes of that depth; vocab_size and learning_rate are set later."""
    dim = HEAD_DIM * depth
    context = 1 << (CONTEXT_PER_BLOCK * depth - 1).bit_length()
    config = ModelConfig(
        vocab_size=1,
        dim=dim,
        depth=depth,
        heads=depth,
        head_dim=HEAD_DIM,
        ff_dim=4 * dim,
        context=min(MOST_CONTEXT, max(LEAST_CONTEXT, context)),
    )
    return Preset(config, ADAMW_RATE, "of --depth")


def scaled(
    settings: PretrainSettings, vocab_size: int, epoch_tokens: int
) -> tuple[PretrainSettings, dict[str, Any]]:
    """The settings with the values that --depth derives, and those values by name.

    Values that are set are kept, and the rules use them. The steps of --minutes are not known yet:
    it counts as D = 20 N.
    """
    assert settings.depth is not None
    values: dict[str, Any] = {}

    def derive(name: str, given: Any, value: Any) -> Any:
        if given is None:
            values[name] = given = float(f"{value:.3g}") if isinstance(value, float) else value
        return given

    config = replace(of_depth(settings.depth).config, vocab_size=vocab_size)
    for name in ("dim", "heads", "head_dim", "ff_dim", "kv_heads"):
        size = derive(f"arch.{name}", getattr(settings.arch, name), getattr(config, name))
        config = replace(config, **{name: size})
    length = derive("sequence_length", settings.sequence_length, config.context)

    whole = Ramp.parse(settings.batch_ramp).mean
    tokens = TOKENS_PER_PARAMETER * config.parameters
    if settings.epochs:
        tokens = settings.epochs * epoch_tokens
    best = BEST_BATCH * (tokens / FITTED_TOKENS) ** BATCH_POWER
    rows = max(1, 2 ** round(math.log2(best / length)))
    batch = derive("batch_tokens", settings.batch_tokens, length * rows)
    steps = settings.steps or math.ceil(tokens / (batch * whole))
    if not settings.lengths:
        derive("steps", None, steps)

    tokens = steps * batch * whole
    name = derive("optim.name", settings.optim.name, "muon")
    optim = replace(settings.optim, name=name)
    width = config.dim / FITTED_DIM
    factor = (batch / FITTED_BATCH) ** RATE_BATCH_POWER
    factor *= (tokens / FITTED_TOKENS) ** RATE_TOKENS_POWER
    rate = (REST_RATE if name == "muon" else ADAMW_RATE) * width**DIM_POWER * factor
    rate = derive("optim.lr", optim.lr, optim.peak(rate, config.dim))
    if name == "muon":
        rate = MUON_RATE * width**MUON_DIM_POWER * factor
        rate = derive("optim.muon_lr", optim.muon_lr, rate)
    if optim.rule == "fixed":
        share = TIMESCALE * (tokens / config.parameters) ** TIMESCALE_POWER
        decay = min(MOST_DECAY, 1 / (share * rate * steps))
        derive("optim.weight_decay", optim.weight_decay, decay)
    return _with(settings, values), values


def _with(settings: PretrainSettings, values: dict[str, Any]) -> PretrainSettings:
    """The settings with values at dotted names."""
    parts: dict[str, dict[str, Any]] = {"": {}, "arch": {}, "optim": {}}
    for name, value in values.items():
        part, _, field = name.rpartition(".")
        parts[part][field] = value
    optim = replace(settings.optim, **parts["optim"]).resolved()
    return replace(settings, arch=replace(settings.arch, **parts["arch"]), optim=optim, **parts[""])
