"""The whole model in one process, from one that is sharded: to generate text and to export."""

import torch

from openpalm.model.sharding import whole
from openpalm.model.transformer import Transformer


@torch.no_grad()
def gather_into(plain: Transformer | None, model: Transformer) -> None:
    """Copies the sharded `model` into `plain`, one parameter at a time; all processes must call it.

    plain: None on a process that only sends its parts.
    """
    own = {} if plain is None else dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if plain is not None:
            own[name].copy_(value)
