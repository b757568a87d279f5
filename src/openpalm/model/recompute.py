"""Activation checkpointing (recomputation): less memory for more time in the backward pass.

Attached from outside: it replaces the forward of each block; parameters and results do not change.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from openpalm.model.transformer import Transformer

Recompute = Literal["none", "selective", "full", "offload"]

_aten = torch.ops.aten
_KEPT = {_aten.mm.default, _aten.addmm.default}
"""Outputs that `selective` keeps: those of the large matrices, which cost most to compute."""


def recompute(model: Transformer, what: Recompute) -> None:
    """Makes the model's blocks keep fewer activations for the backward pass (Chen et al. 2016).

    full keeps only the input of each block and computes the block twice: about a third more
    arithmetic. selective also keeps the products of the large matrices and recomputes the rest,
    attention included (after Korthikanti et al. 2022, section 5). offload is full with the blocks'
    inputs in the CPU's memory until the backward pass.
    """
    if what == "none":
        return
    more: dict[str, Any] = {}
    if what == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **more)
        if what == "offload":
            forward = functools.partial(_offloaded, forward)
        block.forward = forward  # type: ignore[method-assign]


def _offloaded(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs `forward`; what it keeps for the backward pass waits in the CPU's memory.

    Around `checkpoint`, which keeps a block's inputs and no weights: weights would be copied too.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
