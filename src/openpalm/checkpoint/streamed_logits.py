"""Logits of a model larger than memory: one block of its weights is read at a time."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpalm.model.config import ModelConfig
from openpalm.model.embedding_head import Embedding, ProjectHead
from openpalm.model.transformer import Transformer


class _ReadEmbedding(Embedding):
    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.state = state

    def forward(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, self.state["embedding"]).float()


class _ReadHead(ProjectHead):
    def __init__(self, state: Mapping[str, Tensor], name: str):
        super().__init__()
        self.state, self.name = state, name

    def forward(self, states: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(states, self.state[self.name].float(), bias)


@torch.no_grad()
def streamed_logits(config: ModelConfig, state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """What Transformer.logits returns, computed in float32; ids [batch, time].

    The model is the usual one: its embedding and head read their tables when they are called, and
    every block is filled before it runs and emptied after it.
    """
    with torch.device("meta"):
        model = Transformer(config).eval()
    model.embed = _ReadEmbedding(state)
    model.project_head = _ReadHead(state, "embedding" if config.tied else "unembedding")
    for name in ("embedding_bias", "head_bias"):
        if getattr(model, name) is not None:
            setattr(model, name, nn.Parameter(state[name].float()))
    _fill(model.norm, "norm.", state)
    for layer, block in enumerate(model.blocks):

        def fill(module: nn.Module, _: Any, layer: int = layer) -> None:
            _fill(module, f"blocks.{layer}.", state)

        def empty(module: nn.Module, *_: Any) -> None:
            module.to("meta")

        block.register_forward_pre_hook(fill)
        block.register_forward_hook(empty)
    return model.logits(ids)


def _fill(module: nn.Module, prefix: str, state: Mapping[str, Tensor]) -> None:
    own = {name: state[prefix + name].float() for name, _ in module.named_parameters()}
    module.load_state_dict(own, assign=True)
