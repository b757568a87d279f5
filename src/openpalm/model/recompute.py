"""Activation checkpointing (recomputation): less memory for more time in the backward pass.

Attached from outside: it replaces the forward of each block; parameters and results do not change.
"""

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from openpalm.model.transformer import Transformer

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_KEPT = {_aten.mm.default, _aten.addmm.default}
"""Outputs that `selective` keeps: those of the large matrices, which cost most to compute."""


def recompute(model: Transformer, what: Recompute) -> None:
    """Makes the model's blocks keep fewer activations for the backward pass (Chen et al. 2016).

    full keeps only the input of each block and computes the block twice: about a third more
    arithmetic. selective also keeps the products of the large matrices and recomputes the rest,
    attention included (after Korthikanti et al. 2022, section 5).
    """
    if what == "none":
        return
    more: dict[str, Any] = {}
    if what == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **more)
        block.forward = forward  # type: ignore[method-assign]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
