"""What a plan is made for: the model, its training settings and the size of a step.

Imports no torch: everything in this folder is arithmetic, except measuring this machine.
"""

from dataclasses import dataclass, replace
from typing import Literal

from openpalm.errors import SettingsError
from openpalm.model.config import LoraConfig, ModelConfig
from openpalm.plan.layouts import Layout
from openpalm.train.optimizer_settings import OptimizerName

Recompute = Literal["none", "selective", "full", "offload"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full", "offload")
"""By the activations that they keep, most first."""

ITEM = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class Training:
    """A model, its settings, and the rows of one microbatch of one data-parallel rank."""

    config: ModelConfig
    context: int
    """tokens per sequence"""
    rows: int
    """sequences per microbatch"""
    accumulation: int = 1
    """microbatches per step"""
    optimizer: OptimizerName = "adamw"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Recompute = "none"
    reshard: bool = True
    """whether FSDP frees gathered weights after each block's forward pass"""
    loss_chunk: int | None = None
    """positions whose logits are in memory at once; None: as many as are fast"""
    lora: LoraConfig | None = None
    trained_layers: int | None = None
    """the last blocks that are trained, if not all"""
    frozen_copies: int = 0
    """further models in float32 that are not trained, such as a reference policy"""

    @property
    def item(self) -> int:
        """Bytes of a number of the arithmetic."""
        return ITEM[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens per microbatch of one data-parallel rank."""
        return self.rows * self.context

    @property
    def trains_tables(self) -> bool:
        """Whether embedding and head are trained."""
        return self.lora is None and self.trained_layers is None


def cut_batch(
    training: Training, layout: Layout, *, batch_tokens: int, microbatch_tokens: int
) -> Training:
    """The training with the rows and microbatches of one data-parallel rank.

    Raises SettingsError if the batch does not divide.
    """
    ranks, length = layout.data, training.context
    sequences, rest = divmod(batch_tokens, length * ranks)
    if rest:
        near = [n * length * ranks for n in (sequences, sequences + 1) if n]
        raise SettingsError(
            f"--batch-tokens {batch_tokens}: must be a multiple of sequence x replicate x shard "
            f"({length} x {ranks}); use {' or '.join(map(str, near))}"
        )
    room = max(1, microbatch_tokens // length)
    rows = max(r for r in range(1, min(room, sequences) + 1) if sequences % r == 0)
    return replace(training, rows=rows, accumulation=sequences // rows)
