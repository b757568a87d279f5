"""What a few minutes on this machine can train well: a model's size, its batch, what it can learn.

A small text is best learnt by the smallest model that has the time to see it often: with 1.4e13
FLOPs (5 minutes on two AVX2 cores) on Python's own documentation, 717,000 tokens, palm-tiny reached
1.70 bits a byte, 2.9M parameters 1.82 and palm-5m 2.03 (docs/training.md has the commands).
"""

from dataclasses import dataclass

import torch

from openpalm.base.device import pick_dtype
from openpalm.train.sizing.measure import matmul_flops

TRAINING_SHARE = 0.5
"""Of the rate of a matrix multiply, what training a small model reaches."""
TOKENS_A_FACT = 640
"""Tokens of fine-tuning, all its phrasings and passes together, that learn one short answer."""


@dataclass(frozen=True)
class Size:
    """A model's size and the batch that suits it."""

    model: str
    sequence_length: int
    batch_tokens: int
    least_flops: float
    """the FLOPs from which on it is chosen"""


SIZES = (
    Size("palm-tiny", 256, 2048, 0.0),
    Size("palm-5m", 512, 4096, 2e14),
)
"""Smallest first. palm-tiny was measured up to 1.4e13 FLOPs; the bound of palm-5m is a guess."""


def training_flops(seconds: float) -> float:
    """FLOPs that training a small model can do in `seconds` here, by a short measurement."""
    device = torch.device("cpu")
    dtype = getattr(torch, pick_dtype("auto", device))
    return TRAINING_SHARE * matmul_flops(device, dtype, repeats=3) * seconds


def affordable(flops: float) -> Size:
    """The size to train on a small text with so many FLOPs."""
    return [size for size in SIZES if size.least_flops <= flops][-1]


def facts(seconds: float, tokens_per_s: float) -> int:
    """Short answers that fine-tuning has the time to learn by heart."""
    return max(8, int(seconds * tokens_per_s / TOKENS_A_FACT))
