"""What a run trains on what, and the Trainer that takes its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openpalm.model.config import ModelConfig
from openpalm.model.recompute import recompute
from openpalm.model.transformer import Transformer
from openpalm.parallel.world import world
from openpalm.train.config import BatchShape, TrainSettings
from openpalm.train.initial_weights import choose_trained
from openpalm.train.objective import Loader, NextToken, Objective
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.probes import Probe
from openpalm.train.trainer import Trainer

_WHILE_MEASURING = 10**6  # steps of a schedule that is only timed
LORA_RATE = 10
"""How much larger the learning rate of an adapter is (Schulman et al. 2025, LoRA Without Regret)"""


@dataclass(frozen=True)
class TrainSpec:
    """What is trained on what; the settings say how long, how fast and where."""

    config: ModelConfig
    fill: Callable[[Transformer], None]
    """gives a fresh model its first weights"""
    make_loader: Callable[[BatchShape, Transformer, torch.dtype], Loader]
    """of the run's model, which a loader of rollouts asks for answers, and its dtype"""
    sequences_per_epoch: int
    learning_rate: float
    make_model: Callable[[ModelConfig], Transformer] = Transformer
    """its parameters are filled later"""
    objective: Objective[Any] | None = None
    """not given is next-token prediction"""
    shape: BatchShape | None = None
    """of a step, where it does not follow from --batch-tokens"""
    items_per_step: Callable[[BatchShape], int] | None = lambda shape: shape.sequences
    """items that a step learns from; None where the size of microbatches changes the result"""
    unit: str = "tokens"
    """what the objective counts"""
    tokenizer_json: str | None = None
    data_hash: str | None = None
    reward_hash: str | None = None
    parent_hash: str | None = None
    parent_fixed: bool = False
    """whether resuming needs the very parent, not only its name: it is the reference"""
    probes: Sequence[Probe] = ()
    best: str | None = None
    """the column of evaluations whose highest value marks the best checkpoint, which is kept"""
    label: str = "train"

    def peak_rate(self, settings: TrainSettings) -> float:
        """The highest learning rate of the run's schedule."""
        adamw_rate = self.learning_rate * (LORA_RATE if settings.lora.rank else 1)
        return settings.optim.peak(adamw_rate, self.config.dim)


def make_trainer(
    settings: TrainSettings,
    spec: TrainSpec,
    shape: BatchShape,
    device: torch.device,
    fill: Callable[[Transformer], None],
    dtype: torch.dtype | None = None,
) -> Trainer:
    """The Trainer of a run, with `fill`'s weights in its model; `dtype` None is the run's."""
    model = spec.make_model(spec.config).to(device)
    fill(model)
    choose_trained(model, settings)
    recompute(model, settings.memory.recompute)
    arithmetic: torch.dtype = dtype or getattr(torch, settings.chosen.dtype or "float32")
    if settings.compile:
        for block in model.blocks:
            block.compile()
    return Trainer(
        model,
        spec.objective or NextToken(settings.z_loss, settings.memory.loss_chunk),
        Optimizer(model, settings.optim, spec.peak_rate(settings)),
        spec.make_loader(shape, model, arithmetic),
        steps=settings.chosen.steps or _WHILE_MEASURING,
        accumulation=shape.accumulation,
        ramp=shape.ramp,
        dtype=arithmetic,
        max_skipped_steps=settings.max_skipped_steps,
        world=world(),
    )
