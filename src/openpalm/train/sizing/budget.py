"""Model size for a time budget of minutes on this machine, and how much it can learn in it.

A small text is learned best by the smallest model that has the time to see it often. With 1.4e13
FLOPs (5 minutes on two AVX2 cores) on Python's own documentation, 717,000 tokens, palm-tiny reached
1.70 bits per byte, 2.9M parameters 1.82 and palm-5m 2.03 (docs/training.md has the commands).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from openpalm.base.device import pick_dtype
from openpalm.train.sizing.measure import matmul_flops

TRAINING_SHARE = 0.5
"""Training rate of a small model as a share of a matrix multiplication's."""
TOKENS_PER_FACT = 640
"""Tokens of fine-tuning, over all phrasings and epochs, that teach one short answer."""


@dataclass(frozen=True)
class Size:
    """A model size and the batch that suits it."""

    model: str
    sequence_length: int
    batch_tokens: int
    least_flops: float
    """training FLOPs from which the size is used"""


SIZES = (
    Size("palm-tiny", 256, 2048, 0.0),
    Size("palm-5m", 512, 4096, 2e14),
)
"""Smallest first. palm-tiny was measured up to 1.4e13 FLOPs; the bound of palm-5m is a guess."""


def size_for(seconds: float, file: Path) -> Size:
    """The size to train in that time, measured once: `file` keeps it for later calls."""
    if file.exists():
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        return next(size for size in SIZES if size.model == model)
    size = affordable(training_flops(seconds))
    file.write_text(json.dumps({"model": size.model}) + "\n", encoding="utf-8")
    return size


def training_flops(seconds: float) -> float:
    """Training FLOPs of a small model in that time, from a short measurement."""
    device = torch.device("cpu")
    dtype = getattr(torch, pick_dtype("auto", device))
    return TRAINING_SHARE * matmul_flops(device, dtype, repeats=3) * seconds


def affordable(flops: float) -> Size:
    """The size to train on a small text with so many FLOPs."""
    return [size for size in SIZES if size.least_flops <= flops][-1]


def facts(seconds: float, tokens_per_s: float) -> int:
    """Number of short answers that fine-tuning can teach in that time."""
    return max(8, int(seconds * tokens_per_s / TOKENS_PER_FACT))
