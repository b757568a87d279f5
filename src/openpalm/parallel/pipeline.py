"""Pipeline parallelism: runs a step's microbatches through the stages, by torch's schedules.

gpipe: all forward passes, then all backward passes (Huang et al. 2019, GPipe). 1f1b: alternating,
so that a process holds the activations of at most `pipeline` microbatches (Narayanan et al. 2019,
PipeDream). interleaved: 1f1b with two stages a process, which halves the idle time (Narayanan et
al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from openpalm.model.sharding import local_part
from openpalm.model.transformer import Transformer
from openpalm.parallel import fsdp, tensor
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.stages import Stage, StagedTransformer
from openpalm.parallel.world import World

Loss = Callable[[Transformer, Any], tuple[Tensor, dict[str, float]]]
"""An objective's loss, summed over a batch, and further sums."""
_TAG = 1
"""Of gradients of single microbatches: torch's schedules send theirs with tag 0."""


class Taker(Protocol):
    """Takes the gradient of each microbatch away from the parameters, and gives back their sum."""

    def take(self, number: int, elsewhere: Mapping[Tensor, Tensor] | None = None) -> None: ...

    def give_back(self) -> None: ...


class Pipeline:
    """Accumulates the gradient of a step's microbatches, with one schedule for all of them.

    Every process of the pipeline gives the same batches and builds positions and masks from them.
    """

    def __init__(
        self, model: StagedTransformer, world: World, settings: ParallelSettings, dtype: torch.dtype
    ):
        self.model = model
        self.world = world
        self.schedule_name = settings.schedule
        self.dtype = dtype
        # With a shard axis weights are gathered in `dtype`, and so is the embedding's output.
        model.stream_dtype = torch.float32 if fsdp.data_mesh(world) is None else dtype
        self._schedule: tuple[Any, Any] = (None, None)
        self._loss: Loss | None = None
        self._batches: Sequence[Any] = ()
        self._divisor = 1.0
        self._total, self._sums = 0.0, dict[str, float]()
        self.taker: Taker | None = None
        self._sent: list[tuple[Any, Tensor]] = []

    def accumulate(
        self,
        loss: Loss,
        batches: Sequence[Any],
        divisor: float,
        taker: Taker | None = None,
    ) -> tuple[float, dict[str, float]]:
        """Adds the gradient of the batches' loss / divisor; returns the sums of loss and metrics.

        The sums are of the last stage; other processes return zeros under the same names. taker:
        gets the gradient of each microbatch, already summed over the other processes of a stage.
        """
        self.taker = taker
        device = self.model.device
        self._loss, self._divisor = loss, divisor
        self._batches = [batch.to(device) for batch in batches]
        self._total, self._sums = 0.0, {}
        # Only the numbers of the microbatches go through torch's schedule.
        numbers = torch.arange(len(batches))
        schedule = self._schedule_of(len(batches))
        schedule.step(numbers, number=numbers, target=numbers, return_outputs=False)
        self._batches = ()
        if taker is not None:
            self._wait_for_sent(0)
            taker.give_back()
        self._add_other_copy()
        return self._total, self._sums

    def take(self, stage: Stage, number: int) -> None:
        """Gives the taker the gradient of a microbatch, which a stage has just computed."""
        if self.taker is not None:
            tensor.sum_gradients(self.model)
            self.taker.take(number, self._of_other_copy(stage))

    def _of_other_copy(self, stage: Stage) -> dict[Tensor, Tensor]:
        """On the first stage: the last one's gradient of a tied table, for the same microbatch.

        The norm of a sum is not known from the norms of its two terms. The last stage is always
        ahead, so the first does not wait. The copies travel over the CPU: sends that wait for their
        receiver would block a GPU.
        """
        table = self.model.embedding
        if table is None or not self.model.config.tied or not (stage.first or stage.last):
            return {}
        own = torch.zeros_like(local_part(table)) if table.grad is None else local_part(table.grad)
        part, group = own.to("cpu", copy=True), self.model.group
        if stage.first:
            dist.recv(part, group=group, group_src=dist.get_world_size(group) - 1, tag=_TAG)
            return {table: part.to(own.device)}
        self._sent.append((dist.isend(part, group=group, group_dst=0, tag=_TAG), part))
        # With 1f1b all but the newest have arrived; this bounds the memory of the other schedules.
        self._wait_for_sent(3 * dist.get_world_size(group))
        return {}

    def _wait_for_sent(self, most: int) -> None:
        """Waits until at most so many sent gradients are on their way."""
        while len(self._sent) > most:
            self._sent.pop(0)[0].wait()

    def _compute(self, stage: Stage, received: Tensor | None, number: int) -> Tensor:
        """The residual stream after a stage, or the loss, of one microbatch."""
        batch, device = self._batches[number], self.model.device
        with torch.autocast(device.type, self.dtype, self.dtype != torch.float32):
            x, metrics = self.model(_stage_pass, self._loss, stage, received, batch)
        if stage == self.model.stages[-1]:
            self._total += x.item() if stage.last else 0.0
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        return x

    def _schedule_of(self, microbatches: int) -> Any:
        """The schedule for this many microbatches of the present shape; the newest one is kept."""
        rows, time = self._batches[0].inputs.shape
        # Context-parallel processes share the positions of each row.
        shape = self.model.stream_shape(rows, time // self.world.axes.context)
        key = microbatches, shape
        if self._schedule[0] != key:
            self._schedule = key, self._new_schedule(microbatches, shape)
        return self._schedule[1]

    def _new_schedule(self, microbatches: int, shape: tuple[int, ...]) -> Any:
        stages = [_TorchStage(self, stage, shape) for stage in self.model.stages]

        def scaled(loss: Tensor, _: Tensor) -> Tensor:
            return loss / self._divisor

        if len(stages) > 1:
            return ScheduleInterleaved1F1B(stages, microbatches, scaled, scale_grads=False)  # type: ignore[arg-type]
        # 1f1b needs a microbatch for every stage; fewer occur only while a run is measured.
        fills = microbatches >= stages[0].num_stages
        kind = Schedule1F1B if self.schedule_name == "1f1b" and fills else ScheduleGPipe
        return kind(stages[0], microbatches, scaled, scale_grads=False)

    def _add_other_copy(self) -> None:
        """Sums the gradients of both copies of a tied table, on the first and the last stage."""
        table = self.model.embedding
        if table is None or table.grad is None or not self.model.config.tied:
            return
        own = local_part(table.grad)
        other = torch.empty_like(own)
        group = self.model.group
        peer = dist.get_world_size(group) - 1 if self.model.stages[0].first else 0
        rank = dist.get_global_rank(group, peer)
        ops = [dist.P2POp(dist.isend, own, rank, group), dist.P2POp(dist.irecv, other, rank, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        own += other  # the order of a sum of two does not matter: both copies stay equal


def pipeline_of(
    model: Transformer, world: World, settings: ParallelSettings, dtype: torch.dtype
) -> Pipeline | None:
    """The pipeline of a model that `stages.cut` made; None for any other."""
    return Pipeline(model, world, settings, dtype) if isinstance(model, StagedTransformer) else None


def _stage_pass(
    model: StagedTransformer, loss: Loss, stage: Stage, received: Tensor | None, batch: Any
) -> tuple[Tensor, dict[str, float]]:
    """The residual stream after a stage, or the loss on the last one, and the objective's sums.

    The objective is called on every stage: it builds the layout, and its calls of `residual` and
    `cross_entropy` compute this stage's part only.
    """
    with model.at(stage, received):
        value, metrics = loss(model, batch)
        if not stage.last:
            assert model.passed_on is not None
            value = model.passed_on
    return value, metrics


class _TorchStage(PipelineStage):
    """A stage for torch's schedules, which send and receive the residual stream."""

    def __init__(self, pipeline: Pipeline, stage: Stage, shape: tuple[int, ...]):
        model = pipeline.model
        stream = torch.empty(shape, dtype=model.stream_dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        super().__init__(
            _Compute(pipeline, stage),
            stage.number,
            stage.count,
            model.device,
            # Given, because torch would otherwise run a pass to infer them.
            input_args=(number if stage.first else stream,),
            output_args=(loss if stage.last else stream,),
            group=model.group,
        )
        self._pipeline, self._stage = pipeline, stage
        blocks = [model.blocks.get_submodule(str(n)) for n in stage.blocks]
        # The rest of the model belongs to the first and the last stage.
        self._modules_of_stage = [*blocks, model] if stage.first or stage.last else blocks

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **options: Any) -> None:
        for module in self._modules_of_stage:
            last = bwd_chunk_id == self.chunks - 1  # type: ignore[operator]
            wanted = last or self._pipeline.taker is not None
            fsdp.reduce_over_replicas(module, wanted, recurse=False)
        super().backward_one_chunk(bwd_chunk_id, *args, **options)
        self._pipeline.take(self._stage, bwd_chunk_id)


class _Compute(nn.Module):
    """The module that torch calls; it has no parameters, because FSDP is attached to the model."""

    def __init__(self, pipeline: Pipeline, stage: Stage):
        super().__init__()
        self._call = lambda received, number: pipeline._compute(stage, received, number)
        self._first = stage.first

    def forward(self, received: Tensor, *, number: Tensor) -> Tensor:
        return self._call(None if self._first else received, int(number))
