"""The whole model in one process, from one that is sharded: to generate text and to export."""

import torch

from openpalm.model.sharding import whole
from openpalm.model.transformer import Transformer


@torch.no_grad()
def gather_into(plain: Transformer, model: Transformer, *, keep: bool = True) -> None:
    """Copies the sharded `model` into `plain`, one parameter at a time; all processes must call it.

    keep: whether this process needs the copy; the others only send their parts.
    """
    own = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if keep:
            own[name].copy_(value)
