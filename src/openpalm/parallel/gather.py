"""The whole model in one process, from a distributed one: to generate text and to export."""

from collections.abc import Iterator

import torch
from torch import Tensor

from openpalm.model.sharding import whole
from openpalm.model.transformer import Transformer
from openpalm.parallel.stages import StagedTransformer


@torch.no_grad()
def gather_into(plain: Transformer | None, model: Transformer) -> None:
    """Copies the distributed `model` into `plain`; all processes must call it.

    One parameter at a time is whole on every process. plain: None on a process that only sends its
    parts.
    """
    own = {} if plain is None else dict(plain.named_parameters())
    for name, value in _whole_parameters(model):
        if plain is not None:
            own[name].copy_(value)


def _whole_parameters(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the model, also those of other pipeline stages."""
    own = dict(model.named_parameters())
    for name in model.parameter_shapes():
        value = whole(own[name].detach()) if name in own else None
        if isinstance(model, StagedTransformer):
            value = model.from_its_stage(name, value)
        assert value is not None
        yield name, value
