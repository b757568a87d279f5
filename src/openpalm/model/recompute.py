"""Activations computed again in the backward pass instead of kept: memory for time.

Attaches from outside: blocks, weights and results stay what they are.
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


def recompute(model: Transformer, what: Recompute) -> None:
    """From now on the model's blocks keep less for the backward pass (Chen et al. 2016).

    full keeps a block's input only, and computes the block twice: about a third more arithmetic.
    selective keeps the products of the large matrices too, and computes again what lies between
    them, attention included (after Korthikanti et al. 2022, section 5).
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
