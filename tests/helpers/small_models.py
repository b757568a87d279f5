"""Small models in every shape the config allows, their parameters far from special values."""

from dataclasses import replace

import torch

from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

BASE = ModelConfig(
    vocab_size=50, dim=24, depth=2, heads=4, head_dim=8, ff_dim=40, context=32, xpos_base=0.0
)
SHAPES = {
    "multi-query": BASE,
    "grouped": replace(BASE, kv_heads=2),
    "multi-head": replace(BASE, kv_heads=4),
    "xpos": replace(BASE, xpos_base=16.0),
    "qk-norm": replace(BASE, qk_norm=True, xpos_base=16.0),
    "interleaved": replace(BASE, rotary="interleaved"),
    "partial": replace(BASE, rotary_dims=4),
    "partial-xpos": replace(BASE, rotary_dims=4, xpos_base=16.0),
    "raw-head": replace(BASE, norm_before_head=False),
    "logit-scale": replace(BASE, logit_scale=24**-0.5),
    "gpt-j": replace(
        BASE,
        kv_heads=4,
        feedforward="gelu",
        bias=True,
        tied=False,
        rotary="interleaved",
        rotary_dims=4,
    ),
    "encoder": replace(BASE, causal=False),
    "encoder-grouped": replace(BASE, causal=False, kv_heads=2, qk_norm=True),
}


@torch.no_grad()
def make(config: ModelConfig, seed: int = 0) -> Transformer:
    """That model in eval mode; every parameter moved, so that none is zero or one by chance."""
    model = Transformer(config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def ids_for(config: ModelConfig, rows: int = 2, time: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (rows, time), generator=generator)
