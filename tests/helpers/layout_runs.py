"""Training steps of a small model on one process or on several, for comparing layouts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpalm.data.batches.loader import token_loader
from openpalm.model.config import PRESETS, ModelConfig
from openpalm.model.sharding import whole
from openpalm.model.transformer import initialise
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import join
from openpalm.train.config import PretrainSettings
from openpalm.train.microbatches import batch_shape
from openpalm.train.optimizer_settings import OptimSettings
from openpalm.train.spec import TrainSpec, make_trainer
from openpalm.train.trainer import Trainer

CONFIG = replace(
    PRESETS["palm-tiny"].config,
    vocab_size=97,
    dim=32,
    depth=4,
    heads=4,
    head_dim=8,
    ff_dim=64,
    context=32,
)
STEPS = 10


def tokens() -> Tensor:
    """Tokens with something to learn: each depends on the one before it."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randint(0, 5, (6000,), generator=generator)
    return (torch.arange(6000) * 3 + noise) % CONFIG.vocab_size


class _Documents:
    """Documents of 11 tokens."""

    def segments(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) // 11


def trainer_for(
    parallel: dict[str, Any] | None = None,
    *,
    config: ModelConfig = CONFIG,
    optimizer: str = "adamw",
    accumulation: int = 2,
    sequences: int = 16,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Trainer:
    """The trainer of this process, as the command makes it; `sequences` a step in all."""
    asked = PretrainSettings(
        data=Path("data"),
        out=Path("out"),
        model="palm-tiny",
        steps=steps,
        sequence_length=config.context,
        batch_tokens=sequences * config.context,
        parallel=ParallelSettings(**(parallel or {})),
        optim=OptimSettings(name=optimizer, lr=3e-3),  # type: ignore[arg-type]
        **settings,
    )
    world = join(asked.parallel, torch.device("cpu"))
    rows = sequences // world.data_size // accumulation
    asked = replace(asked, microbatch_tokens=rows * config.context)
    shape = replace(batch_shape(asked, config.context, world.data_size), rank=world.data_rank)
    spec = TrainSpec(
        config=config,
        fill=lambda model: initialise(model, 1),
        make_loader=lambda shape, *_: token_loader(
            tokens().numpy(),
            sequence_length=shape.sequence_length,
            rows=shape.rows,
            seed=3,
            rank=shape.rank,
            world_size=shape.processes,
            documents=_Documents() if asked.document_mask else None,  # type: ignore[arg-type]
        ),
        sequences_per_epoch=100,
        learning_rate=3e-3,
    )
    return make_trainer(asked, spec, shape, torch.device("cpu"), steps=steps, dtype=dtype)


def curve(parallel: dict[str, Any] | None = None, **options: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    trainer = trainer_for(parallel, **options)
    reports = [trainer.train_step() for _ in range(trainer.steps)]
    return [(report.loss, report.grad_norm) for report in reports]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The whole model's weights; all processes must call it."""
    return {name: whole(p).detach().clone() for name, p in trainer.model.named_parameters()}
