"""The training step: forward, backward, gradient accumulation, clipping, optimizer, skipped steps.

The same for every objective. Files, evaluation and sampling are in run.py and the probes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openpalm.base.device import free_memory
from openpalm.base.permutation import order_key
from openpalm.errors import TrainingError
from openpalm.model.sharding import assign
from openpalm.model.transformer import Transformer
from openpalm.parallel import fsdp, tensor
from openpalm.parallel.gather import gather_into
from openpalm.parallel.pipeline import Loss, Pipeline
from openpalm.parallel.world import World
from openpalm.train.batch_shape import Ramp
from openpalm.train.objective import Loader, Metrics, Objective, StatefulLoader
from openpalm.train.optimization.loss_scale import LossScale
from openpalm.train.optimization.noise_scale import NoiseScale
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimization.schedule import learning_rate_factor

WHOLE_SHARE = 0.4
"""Share of the main process's memory that a copy of a sharded model may take."""


@dataclass(frozen=True)
class StepReport:
    """Result of one step."""

    step: int
    loss: float
    """mean over `count`, for the whole global batch"""
    count: int
    """number that the loss is divided by: tokens, pairs; over all microbatches and processes"""
    grad_norm: float
    """global norm of the gradient before clipping"""
    lr_factor: float
    """learning rate as a share of the peak"""
    skipped: str | None = None
    """the reason why the weights did not change, or None"""
    metrics: Metrics = field(default_factory=dict)
    """the objective's own sums divided by `count`"""


class Trainer:
    """Trains a model on an objective, step by step; `state` and `restore` resume it."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective[Any],
        optimizer: Optimizer,
        loader: Loader,
        *,
        steps: int,
        accumulation: int = 1,
        ramp: Ramp | None = None,
        dtype: torch.dtype = torch.float32,
        max_skipped_steps: int = 10,
        world: World | None = None,
        pipeline: Pipeline | None = None,
        seed: int = 0,
        noise_scale: bool = False,
        make_plain: Callable[[], Transformer] | None = None,
    ):
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.loader = loader
        self.steps = steps
        self.accumulation = accumulation
        self.ramp = ramp or Ramp()
        self.dtype = dtype
        self.max_skipped_steps = max_skipped_steps
        self.world = world or World()
        self.pipeline = pipeline
        self.seed = seed
        self._make_plain = make_plain
        self._plain: Transformer | None = None
        self.step = 0
        self.counted = 0
        self.skipped_in_a_row = 0
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.noise = None
        if noise_scale:
            self.noise = NoiseScale([*optimizer.names], optimizer.uncounted)
        self.overflowed = False
        """whether the newest step was skipped because its loss scale was too large"""
        self.own_loss = 0.0
        """this process's part of the last step's loss, to find the process with a bad batch"""
        self.skipped_batches: Sequence[Any] = ()
        """the last step's microbatches, if its loss or gradient is not finite"""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def train_step(self) -> StepReport:
        """Takes one optimizer step on the next global batch."""
        microbatches = int(self.accumulation * self.ramp.share(self.step + 1, self.steps))
        batches = self._next_batches(microbatches)
        self._seed_step()
        self.model.train()
        loss, count, metrics = self.forward_backward(batches)
        self.step += 1
        self.counted += count
        factor = learning_rate_factor(self.step, self.steps, self.optimizer.settings)
        norm, skipped = self.optimizer_step(loss, count, factor)
        # An overflow of float16 is part of finding its loss scale, and no fault of a batch.
        self.skipped_batches = batches if skipped and count and not self.overflowed else ()
        self._stop_if_only_skipping(skipped)
        if isinstance(self.loader, StatefulLoader):
            metrics |= self.loader.facts
        if self.loss_scale is not None:
            metrics |= {"loss_scale": self.loss_scale.scale}
        return StepReport(self.step, loss, count, norm, factor, skipped, metrics)

    def _next_batches(self, number: int) -> list[Any]:
        """This process's next microbatches; data that fail on one process fail on all."""

        def take() -> list[Any]:
            return [next(self.loader) for _ in range(number)]

        # Rollouts exchange tensors, and agree on the errors of rewards, by themselves. A process
        # that failed between must end: here it would wait for those that wait for its tensors.
        own = isinstance(self.loader, StatefulLoader)
        return take() if own else self.world.together(take)

    def _seed_step(self) -> None:
        """Seeds dropout by the step and by what this process computes, so it needs no saved state.

        Tensor-parallel processes draw the same numbers: they share the activations.
        """
        place = self.world.coordinate
        axes = self.world.axes
        part = (self.world.data_rank * axes.context + place["context"]) * axes.pipeline
        part += place["pipeline"]
        torch.manual_seed(order_key(order_key(self.seed, self.step + 1), part))

    def forward_backward(self, batches: Sequence[Any]) -> tuple[float, int, Metrics]:
        """Accumulates the gradient of the mean loss; returns that mean, its count, the metrics."""
        # Counted over all microbatches and processes BEFORE backward: a mean of microbatch means
        # is another loss as soon as microbatches have different counts.
        counts = self.world.sums([self.objective.count(batch) for batch in batches])
        count = round(sum(counts))
        if count == 0:
            return math.nan, 0, {}
        # FSDP averages gradients over processes: the loss is scaled so that the average is a sum.
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        divisor = count / self.world.axes.averaged / scale
        loss = self.objective.loss
        if self.pipeline is not None:
            total, sums = self.pipeline.accumulate(loss, batches, divisor, self.noise)
        else:
            total, sums = self._accumulate(loss, batches, divisor)
        if self.noise is None:  # which sums those of each microbatch
            tensor.sum_gradients(self.model)
        self.own_loss = total
        # Every process has the same metrics, in the same order.
        total, *values = self.world.sums([total, *sums.values()])
        means = {name: value / count for name, value in zip(sums, values, strict=True)}
        _divide(means, getattr(self.objective, "ratios", {}))
        if self.noise is not None:
            means |= self.noise.metrics(counts, scale)
        return total / count, count, means

    def _accumulate(
        self, loss_of: Loss, batches: Sequence[Any], divisor: float
    ) -> tuple[float, Metrics]:
        """Adds the gradient of the summed loss / divisor; returns the sums of loss and metrics."""
        total, sums = 0.0, Metrics()
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            fsdp.reduce_over_replicas(self.model, last or self.noise is not None)
            with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                loss, metrics = self.model(loss_of, batch.to(self.device))
            (loss / divisor).backward()
            if self.noise is not None:
                tensor.sum_gradients(self.model)
                self.noise.take(number)
            total += loss.item()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        return total, sums

    def optimizer_step(self, loss: float, count: int, factor: float) -> tuple[float, str | None]:
        """Clips and steps, or skips; returns the gradient norm and the reason for skipping."""
        self.overflowed = False
        if count == 0:
            reason, norm = "nothing to count", 0.0
        else:
            norm = self.optimizer.clip(1.0 if self.loss_scale is None else self.loss_scale.scale)
            # The loss is a sum over all processes, so that all skip the same steps.
            finite = math.isfinite(loss), math.isfinite(norm)
            reason = None if all(finite) else f"{'gradient' if finite[0] else 'loss'} not finite"
            if self.loss_scale is not None and finite[0]:
                reason = self._rescale(self.loss_scale, reason)
        if reason is None:
            self.optimizer.step(factor)
        else:
            self.optimizer.zero_grad()
        return norm, reason

    def _rescale(self, loss_scale: LossScale, reason: str | None) -> str | None:
        """Adapts the loss scale to a step with a finite loss; returns the reason to skip it."""
        self.overflowed = reason is not None and loss_scale.lowered()
        if reason is None:
            loss_scale.count_good_step()
        elif self.overflowed:
            return f"gradient overflow in float16, loss scale lowered to {loss_scale.scale:g}"
        return reason

    def fits_whole(self) -> bool:
        """Whether the main process has room for the whole model; all must call it."""
        if self.world.size == 1:
            return True
        needed = 4 * sum(math.prod(shape) for shape in self.model.parameter_shapes().values())
        return self.world.on_main(lambda: needed <= WHOLE_SHARE * free_memory(self.device))

    def gathered(self) -> Transformer | None:
        """The model without sharding, in eval mode, on the main process; all must call it.

        It shares the weights of a model that is not sharded, and is overwritten by the next call.
        """
        if self.world.size == 1:
            return self.model.eval()
        if self._plain is None and self.world.is_main:
            assert self._make_plain is not None
            self._plain = self._make_plain().eval()
        gather_into(self._plain, self.model)
        return self._plain

    def _stop_if_only_skipping(self, skipped: str | None) -> None:
        if skipped and self.overflowed:
            return  # no sign of divergence: the next steps have a smaller loss scale
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise TrainingError(
                f"step {self.step}: {skipped}, {self.skipped_in_a_row} steps in a row; the last "
                "checkpoint is good: lower --optim.lr or raise --optim.warmup and start from it"
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state that `restore` needs, as tensors and JSON values; without published weights."""
        tensors = {f"optimizer/{k}": v for k, v in self.optimizer.state_tensors().items()}
        tensors |= {f"model/{k}": v.detach() for k, v in self._unpublished()}
        if isinstance(self.loader, StatefulLoader):
            tensors |= {f"loader/{k}": v for k, v in self.loader.state_tensors().items()}
        values = {
            "step": self.step,
            "counted": self.counted,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loader": self.loader.state_dict(),
            "optimizer": self.optimizer.settings.kind,
        }
        for name, part in (("loss_scale", self.loss_scale), ("noise_scale", self.noise)):
            if part is not None:
                values[name] = part.state()
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Restores `state`: the next step is that of an uninterrupted run.

        Raises KeyError, TypeError, ValueError or RuntimeError for values that `state` never gives.
        """
        step, counted, skipped = (
            _whole_number(values, name) for name in ("step", "counted", "skipped_in_a_row")
        )
        if self.loss_scale is not None:
            self.loss_scale.restore(values["loss_scale"])
        if self.noise is not None and "noise_scale" in values:
            self.noise.restore(values["noise_scale"])  # the option may be new
        # A pipeline stage holds only some of the parameters.
        elsewhere = {*self.model.parameter_shapes()} - {n for n, _ in self.model.named_parameters()}
        moments = _under("optimizer/", tensors).items()
        own_moments = {k: v for k, v in moments if k.rpartition("/")[0] not in elsewhere}
        self.optimizer.load_state_tensors(own_moments)
        own = _under("model/", tensors)
        with torch.no_grad():
            for name, parameter in self._unpublished():
                assign(parameter, own[name])
        self.step, self.counted, self.skipped_in_a_row = step, counted, skipped
        self.loader.load_state_dict(values["loader"])
        if isinstance(self.loader, StatefulLoader):
            self.loader.load_state_tensors(_under("loader/", tensors))

    def _unpublished(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that only training needs, such as a critic's."""
        published = {name for name, _ in self.model.published_parameters()}
        return [item for item in self.model.named_parameters() if item[0] not in published]


def _divide(means: Metrics, ratios: dict[str, str]) -> None:
    """Divides metrics by others, which are taken out; those without a divisor are too."""
    for name, divisor in ratios.items():
        if divisor in means:
            value, by = means.pop(name), means.pop(divisor)
            if by:
                means[name] = value / by


def _whole_number(values: dict[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
