"""Probes: measurements of the model while it trains, such as validation loss and samples.

The callables come from outside, because `train` imports neither `evaluate` nor `generate`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from openpalm.model.transformer import Transformer


@dataclass(frozen=True)
class Probe:
    """A measurement taken every `eval_every` steps and after the last step."""

    measure: Callable[[Transformer, torch.dtype], dict[str, Any]]
    """columns of a row, from the model and the dtype of the run's arithmetic"""
    file: str = "metrics.jsonl"
    """file of the run directory that gets the row"""
    describe: Callable[[dict[str, Any]], str] | None = None
    """the row as one line for the terminal"""
    alarm: Callable[[list[dict[str, Any]]], str | None] | None = None
    """the reason why the run must stop, from all its rows so far, or None"""
    tokens: int | None = None
    """tokens whose loss is computed, if the probe does nothing else: its time can be predicted"""
