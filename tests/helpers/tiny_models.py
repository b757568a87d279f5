"""Models small enough to try every kind of; their logits differ enough to have a clear best."""

import torch

from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

SIZES = {
    "vocab_size": 265,
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "head_dim": 8,
    "ff_dim": 64,
    "context": 64,
}
KINDS = {
    "multi-query": {},
    "grouped": {"kv_heads": 2},
    "multi-head": {"kv_heads": 4},
    "xpos": {"xpos_base": 512.0},
    "qk-norm": {"qk_norm": True},
    "padded-vocabulary": {"vocab_size": 70},
    "logit-scale": {"logit_scale": 0.5},
    "gpt-j": {
        "kv_heads": 4,
        "feedforward": "gelu",
        "bias": True,
        "tied": False,
        "rotary": "interleaved",
        "rotary_dims": 4,
    },
}


def tiny(seed: int = 0, **changes: object) -> Transformer:
    """A model of random weights in eval mode."""
    model = Transformer(ModelConfig(**(SIZES | changes)))  # type: ignore[arg-type]
    initialise(model, seed)
    with torch.no_grad():
        for table in (model.embedding, model.unembedding):
            if table is not None:
                table *= 20
    return model.eval()


def deaf(model: Transformer) -> Transformer:
    """The model in training mode for good: its dropout stays on, whatever it is told."""
    model.train()
    model.eval = lambda: model  # type: ignore[method-assign]
    return model
