"""What a run trains: model, data, objective and probes; and the Trainer made from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openpalm.base.settings import spell
from openpalm.errors import SettingsError, count_of
from openpalm.model import lora
from openpalm.model.config import ModelConfig
from openpalm.model.recompute import recompute
from openpalm.model.transformer import Transformer
from openpalm.parallel import fsdp, stages, tensor
from openpalm.parallel.context import check_length, context_split
from openpalm.parallel.pipeline import pipeline_of
from openpalm.parallel.world import world
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import TrainSettings
from openpalm.train.initial_weights import unfilled
from openpalm.train.microbatches import batch_shape, check_pipeline
from openpalm.train.objective import Loader, NextToken, Objective
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.probes import BestBy, Probe
from openpalm.train.trainer import Trainer

LORA_RATE = 10
"""Learning rate of an adapter, as a multiple of the weights' (Schulman et al. 2025, LoRA Without
Regret)."""


@dataclass(frozen=True)
class TrainSpec:
    """What a run trains; the settings say for how long, how fast and in which directory."""

    config: ModelConfig
    fill: Callable[[Transformer], None]
    """gives a new model its initial weights"""
    make_loader: Callable[[BatchShape, Transformer, torch.dtype], Loader]
    """makes the data loader; a loader of rollouts samples from the run's model, in its dtype"""
    sequences_per_epoch: int
    learning_rate: float
    make_model: Callable[[ModelConfig], Transformer] = Transformer
    """makes the model; `fill` fills it later"""
    objective: Objective[Any] | None = None
    """None is next-token prediction"""
    shape: BatchShape | None = None
    """shape of a step, if it does not follow from --batch-tokens"""
    items_per_step: Callable[[BatchShape], int] | None = lambda shape: shape.global_sequences
    """items that a step learns from; None if the size of microbatches changes the result"""
    unit: str = "tokens"
    """what the objective counts"""
    tokenizer_json: str | None = None
    data_hash: str | None = None
    reward_hash: str | None = None
    parent: Path | None = None
    """checkpoint of the initial weights; --keep-optimizer takes over its optimizer state"""
    parent_hash: str | None = None
    parent_fixed: bool = False
    """whether a resumed run needs the same parent weights, because they are the reference"""
    probes: Sequence[Probe] = ()
    best: BestBy | None = None
    """how the best checkpoint is known; None if nothing is evaluated"""
    label: str = "train"
    """name of the run in the terminal"""

    def peak_rate(self, settings: TrainSettings) -> float:
        """The peak learning rate of the run."""
        adamw_rate = self.learning_rate * (LORA_RATE if settings.lora.rank else 1)
        return settings.optim.peak(adamw_rate, self.config.dim)

    def check(self, settings: TrainSettings) -> None:
        """Raises SettingsError for a setting that this training would ignore or cannot follow."""
        if settings.keep_best and self.best is None:
            raise SettingsError(
                "--keep-best: no data is held out, so no checkpoint is known to be the best; give "
                "data with a validation part, or leave it out"
            )
        tensor.check(self.config, settings.parallel.tensor)
        if self.shape is not None and settings.batch_ramp is not None:
            raise SettingsError("--batch-ramp: a step on rollouts has one size; leave it out")
        next_token = {
            "z_loss": settings.z_loss or None,
            "memory.loss_chunk": settings.memory.loss_chunk,
        }
        for name, value in next_token.items():
            if self.objective is not None and value is not None:
                raise SettingsError(f"{spell(name)} {value}: is of `train` and `sft`; leave it out")
        context = settings.parallel.context
        if self.objective is not None and context > 1:
            raise SettingsError(
                f"--parallel.context {context}: is for `train` and `sft`; share this model by "
                "--parallel.shard, replicate or tensor"
            )
        check_length(world(), settings.sequence_length or self.config.context)

    def check_shared(self, settings: TrainSettings, shape: BatchShape) -> None:
        """Raises SettingsError if the processes' shares of a step make another step than one's."""
        if self.items_per_step is None or self.shape is not None:
            return
        alone = self.items_per_step(batch_shape(settings, shape.sequence_length))
        together = self.items_per_step(shape)
        if alone != together:
            tokens = settings.batch_tokens or shape.global_sequences * shape.sequence_length
            raise SettingsError(
                f"--batch-tokens {tokens}: a step of one process has {count_of(alone, 'item')}, of "
                f"{shape.processes} processes {together}, because an item needs two sequences; "
                f"take a multiple of {2 * shape.processes * shape.sequence_length}"
            )

    def cut_changes(self, stored: TrainSettings, processes: int, shape: BatchShape) -> str | None:
        """The reason why `shape` gives another result than the stored settings' cut, or None.

        processes: those that read different rows when the run began. Losses are summed and
        divided by one count, so that k microbatches are one batch. That fails if every microbatch
        draws random numbers or estimates a value of its own.
        """
        if self.config.dropout:
            return "dropout draws other random numbers then"
        if self.items_per_step is None or self.shape is not None:
            return "its loss is estimated for each microbatch"
        before = batch_shape(stored, shape.sequence_length, processes)
        if self.items_per_step(before) != self.items_per_step(shape):
            return "its steps would have another number of pairs"
        return None

    def processes_change(
        self, stored: TrainSettings, processes: int, shape: BatchShape
    ) -> str | None:
        """The reason why `shape.processes` give another result than `processes`, or None."""
        # A rollout is the same for any number of processes, and so is the order of its rows.
        rollouts = self.shape is not None and not self.config.dropout
        return None if rollouts else self.cut_changes(stored, processes, shape)

    @property
    def hashes(self) -> dict[str, str | None]:
        """Hashes of what the run reads, by their names in run.json."""
        return {"data": self.data_hash, "parent": self.parent_hash, "reward": self.reward_hash}


def make_trainer(
    settings: TrainSettings,
    spec: TrainSpec,
    shape: BatchShape,
    device: torch.device,
    *,
    steps: int,
    dtype: torch.dtype,
    fill: Callable[[Transformer], None] | None = None,
) -> Trainer:
    """Makes the run's model, optimizer, loader and Trainer; `fill` replaces the spec's weights."""

    def make_unfilled() -> Transformer:
        return unfilled(lambda: spec.make_model(spec.config), settings)

    check_pipeline(settings, shape)
    check_length(world(), shape.sequence_length)
    _check_noise_scale(settings, shape)
    # On the meta device until it is sharded, so that no process ever holds a whole large model.
    model = stages.cut(make_unfilled(), world(), settings.parallel)
    _parallelize(model, settings, dtype)
    model.to_empty(device=device)
    (fill or spec.fill)(model)
    if settings.lora.rank:
        lora.initialise_adapter(model, settings.seed)
    return Trainer(
        model,
        spec.objective or _next_token(settings),
        _optimizer(model, settings, spec.peak_rate(settings)),
        spec.make_loader(shape, model, dtype),
        steps=steps,
        accumulation=shape.accumulation,
        ramp=shape.ramp,
        dtype=dtype,
        max_skipped_steps=settings.max_skipped_steps,
        world=world(),
        pipeline=pipeline_of(model, world(), settings.parallel, dtype),
        seed=settings.seed,
        noise_scale=settings.noise_scale,
        make_plain=lambda: make_unfilled().to_empty(device=device),
    )


def _next_token(settings: TrainSettings) -> NextToken:
    chunk, context = settings.memory.loss_chunk, context_split(world())
    return NextToken(settings.z_loss, chunk, context, last=settings.noise_scale)


def _optimizer(model: Transformer, settings: TrainSettings, rate: float) -> Optimizer:
    optimizer = Optimizer(model, settings.optim, rate, offload=settings.memory.offload_moments)
    named = model.named_parameters()
    optimizer.uncounted = [p for name, p in named if not stages.counted_once(model, name)]
    return optimizer


def _check_noise_scale(settings: TrainSettings, shape: BatchShape) -> None:
    """Raises SettingsError if there are no gradients of microbatches to compare."""
    if settings.noise_scale and shape.accumulation == 1:
        remedy = f"--microbatch-tokens {shape.rows // 2 * shape.sequence_length}"
        if shape.rows == 1:
            remedy = f"--batch-tokens {2 * shape.processes * shape.sequence_length} or more"
        raise SettingsError(
            "--noise-scale: compares microbatches with the batch, but a step is one microbatch; "
            f"give {remedy}"
        )


def _parallelize(model: Transformer, settings: TrainSettings, dtype: torch.dtype) -> None:
    """Attaches shared matrices, recomputation, sharding, compilation, which need this order."""
    tensor.shard_tensor(model, world(), sequence=settings.parallel.sequence)
    recompute(model, settings.memory.recompute)
    fsdp.shard(model, world(), dtype, reshard=settings.parallel.reshard)
    if settings.compile:
        for block in model.blocks:
            block.compile()
