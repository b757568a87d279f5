"""Converts our models to the newest version of palm-rlhf-pytorch, for its strict PaLM.load."""

import torch
from torch import Tensor

from openpalm.convert.eras import NEWEST, Era
from openpalm.convert.palm_rlhf.read import NO_XPOS_BASE, inverse_frequencies, qk_factor, xpos_scale
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig


def write_palm_rlhf(
    config: ModelConfig, state: dict[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor], list[str]]:
    """PaLM's constructor arguments, its state dict (float32), and one-line notes.

    Raises CheckpointError for a config that palm-rlhf-pytorch cannot express.
    """
    _check_writable(config)
    state = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    table = state["embedding"][: config.vocab_size].clone()
    out = {"token_emb.weight": table}
    for i in range(config.depth):
        ours = f"blocks.{i}."
        parts = {n.removeprefix(ours): t for n, t in state.items() if n.startswith(ours)}
        out |= {f"layers.{i}.fn.{n}": t for n, t in _block(config, parts).items()}
    out |= _norm("norm.", state["norm.weight"] * config.logit_scale)
    out["to_logits.weight"] = table  # the same storage, as the original ties it
    notes = [f"matrices fused, norm scales written minus one: this is era {NEWEST}"]
    if config.logit_scale != 1:
        notes.append(f"logit_scale {config.logit_scale:g} folded into the final norm's scale")
    if config.causal and not config.xpos_base:
        notes.append(
            f"no xPos: written as rotary_xpos_scale_base {NO_XPOS_BASE}, which has no effect"
        )
    return _arguments(config), out, notes


def convert_to_era(state: dict[str, Tensor], era: Era, head_dim: int) -> dict[str, Tensor]:
    """Converts a state dict of the newest era to `era`."""
    scale = qk_factor(NEWEST, head_dim) / qk_factor(era, head_dim)
    written = {}
    for name, tensor in state.items():
        if name.endswith("gamma") and not era.gamma_minus_one:
            tensor = tensor + 1
        elif name.endswith((".q_scale", ".k_scale")):
            tensor = tensor * scale
        if era.xpos or not name.endswith("rotary_emb.scale"):
            written[name] = tensor
    return written


def _arguments(config: ModelConfig) -> dict[str, object]:
    base = config.xpos_base
    return {
        "num_tokens": config.vocab_size,
        "dim": config.dim,
        "depth": config.depth,
        "causal": config.causal,
        "dim_head": config.head_dim,
        "heads": config.heads,
        "ff_mult": config.ff_dim // config.dim,
        "qk_rmsnorm": config.qk_norm,
        "rotary_xpos_scale_base": (int(base) if base == int(base) else base) or NO_XPOS_BASE,
    }


def _block(config: ModelConfig, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    if config.qk_norm:  # rms(x) = d^0.5 l2(x), and both multiply the scores by d^-0.5
        for name in ("q_scale", "k_scale"):
            out[name] = parts[f"attention.{name}"] * config.head_dim**0.5
    out |= _norm("norm.", parts["norm.weight"])
    out["rotary_emb.inv_freq"] = inverse_frequencies(config.head_dim)
    out["rotary_emb.scale"] = xpos_scale(config.head_dim)
    rows = [parts[f"project_in.{name}"] for name in ("q", "kv", "up", "gate")]
    out["fused_attn_ff_proj.weight"] = torch.cat(rows)
    out["attn_out.weight"] = parts["project_out.out"]
    out["ff_out.2.weight"] = parts["project_out.down"]
    return out


def _norm(name: str, scale: Tensor) -> dict[str, Tensor]:
    return {f"{name}gamma": scale - 1, f"{name}beta": torch.zeros_like(scale)}


def _check_writable(config: ModelConfig) -> None:
    """palm-rlhf-pytorch has only multi-query SwiGLU, a tied table and fully rotated heads."""
    whole = (0, config.head_dim)
    wanted = {
        "kv_heads": (1,),
        "feedforward": ("swiglu",),
        "bias": (False,),
        "tied": (True,),
        "rotary": ("halves",),
        "rotary_dims": whole,
        "rotary_base": (10000.0,),
        "norm_before_head": (True,),
        "norm_eps": (1e-5,),
        "ff_dim": range(config.dim, config.ff_dim + 1, config.dim),
    }
    for name, values in wanted.items():
        value = getattr(config, name)
        if value not in values:
            needed = "a multiple of dim" if name == "ff_dim" else values[0]
            raise CheckpointError(
                f"palm-rlhf-pytorch cannot express {name} {value}, only {needed}; "
                "keep this model in OpenPaLM's format"
            )
