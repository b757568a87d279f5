"""The fingerprint: a model's logits for 16 fixed tokens, stored with it and compared at loading.

It detects changed weights with a valid manifest, and changed code.
"""

from pathlib import Path

import torch
from torch import Tensor

from openpalm.checkpoint import tensors
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer

FILE = "fingerprint.safetensors"
TOKENS = 16
TOLERANCE = 1e-4


def compute(model: Transformer) -> tuple[Tensor, Tensor]:
    """16 fixed tokens [1, 16] and the model's `output` for them."""
    tokens = fixed_tokens(model.config).to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(output, tokens)
    model.train(training)
    return tokens, logits


def fixed_tokens(config: ModelConfig) -> Tensor:
    """The token ids [1, 16] of every fingerprint, spread over the vocabulary."""
    return torch.arange(TOKENS)[None] * 7919 % config.vocab_size


def output(model: Transformer, ids: Tensor) -> Tensor:
    """Logits, float32; of a reward model its scores, with the first half of the ids as prompt."""
    if not isinstance(model, RewardModel):
        return model.logits(ids)
    lengths = torch.full(ids.shape[:1], ids.shape[1] // 2, device=ids.device)
    return model.score(ids, prompt_lengths=lengths)


def check(model: Transformer, path: Path) -> None:
    """Raises CheckpointError if the model's output differs from the stored one."""
    with tensors.opened(path) as file:
        written = file.tensor("logits") if "logits" in file.shapes() else None
    computed = compute(model)[1].cpu()
    if written is None or written.shape != computed.shape:
        raise CheckpointError(f"{path.parent}: its fingerprint is of another model")
    difference = (written - computed).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, written.abs().max().item()):
        raise CheckpointError(
            f"{path.parent}: computes other logits than when it was written "
            f"(difference {difference:.1e}); the file or the code has changed"
        )
