"""Classes of palm-rlhf-pytorch as ours, small or of a fixture's sizes, and what it saved."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openpalm.compat.palm_rlhf_pytorch import PaLM

PARITY = 1e-4
SMALL: dict[str, Any] = {"num_tokens": 20, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2}
ARGUMENTS = (
    *("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "qk_rmsnorm", "causal"),
    *("flash_attn", "rotary_xpos_scale_base"),
)


def small(seed: int = 0, *, sharp: float = 30.0, **changes: Any) -> PaLM:
    """A PaLM whose next tokens differ clearly in chance, or with sharp=1 hardly."""
    torch.manual_seed(seed)
    palm = PaLM(**(SMALL | changes))
    with torch.no_grad():
        palm.model.embedding *= sharp
    return palm


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def empty(folder: Path, **more: Any) -> PaLM:
    """A PaLM of a fixture's sizes, by the original's argument names."""
    said = json.loads((folder / "config.json").read_text())
    return PaLM(**{key: said[key] for key in ARGUMENTS if key in said}, **more)


def saved(folder: Path, file: str) -> dict[str, Tensor]:
    return torch.load(folder / file, weights_only=True)


def array(folder: Path, name: str) -> Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))


def check_state(
    written: dict[str, Tensor],
    known: dict[str, Tensor],
    rounded: tuple[str, ...] = ("gamma", "q_scale", "k_scale"),
):
    """rounded: what we hold shifted or scaled."""
    assert list(written) == list(known)
    for key, tensor in known.items():
        assert written[key].shape == tensor.shape, key
        assert written[key].dtype == tensor.dtype, key
        if not key.endswith(rounded):
            assert torch.equal(written[key], tensor), key
        else:
            assert torch.allclose(written[key], tensor, rtol=1e-6, atol=1e-6), key
    if "to_logits.weight" in written:
        assert written["to_logits.weight"].data_ptr() == written["token_emb.weight"].data_ptr()
