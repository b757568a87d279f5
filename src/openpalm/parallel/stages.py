"""Pipeline stages: the part of a Transformer that one process holds, and passes for evaluation.

Parameters keep their names in the whole model, so checkpoints do not depend on the layout. The
stages exchange the residual stream only: every process has the batch itself, with its positions
and document mask.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openpalm.errors import SettingsError, count_of
from openpalm.model.lora import shallow_copy_as
from openpalm.model.transformer import Transformer
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import World

STAGES_PER_PROCESS = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
TABLE = "embedding"
"""The embedding table; a tied model's is also that of the head, and the last stage has a copy."""
AT_FIRST = (TABLE, "embedding_bias")
AT_LAST = ("unembedding", "head_bias")
"""Parameters of the first and of the last stage, which also has the final norm."""


@dataclass(frozen=True)
class Stage:
    """Stage `number` (from 0) of `count`, which computes these blocks."""

    number: int
    count: int
    blocks: range

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def all_stages(depth: int, settings: ParallelSettings) -> list[Stage]:
    """All stages of a pipeline: equal numbers of blocks, the first ones with one more.

    The last stages have fewer because the last one also computes the loss. Raises SettingsError if
    there are more stages than blocks.
    """
    count = settings.pipeline * STAGES_PER_PROCESS[settings.schedule]
    if count > depth:
        raise SettingsError(
            f"--parallel.pipeline {settings.pipeline}: {count} stages with --parallel.schedule "
            f"{settings.schedule}, but the model has {count_of(depth, 'block')}; take fewer"
        )
    each, more = divmod(depth, count)
    starts = [number * each + min(number, more) for number in range(count + 1)]
    return [Stage(n, count, range(starts[n], starts[n + 1])) for n in range(count)]


def cut(model: Transformer, world: World, settings: ParallelSettings) -> Transformer:
    """The part of the model that this process holds; the model itself without a pipeline.

    Comes before everything that is attached to blocks, with the parameters on the meta device.
    """
    if world.axes.pipeline == 1:
        return model
    assert world.mesh is not None
    part = shallow_copy_as(model, StagedTransformer)
    part.shapes = model.parameter_shapes()
    part.everywhere = all_stages(model.config.depth, settings)
    part.stages = part.everywhere[world.coordinate["pipeline"] :: world.axes.pipeline]
    part.group = world.mesh["pipeline"].get_group()
    _leave_out_others(part, model)
    return part


def _leave_out_others(part: "StagedTransformer", model: Transformer) -> None:
    """Removes the parameters of other processes' stages."""
    own = [number for stage in part.stages for number in stage.blocks]
    part.blocks = nn.ModuleList()
    part.blocks._modules.update((str(number), model.blocks[number]) for number in own)
    first, last = part.stages[0].first, part.stages[-1].last
    if not last:
        part.norm = nn.Identity()  # type: ignore[assignment]
    kept = (AT_FIRST if first else ()) + (AT_LAST if last else ())
    if last and model.config.tied:
        kept += (TABLE,)
    for name in AT_FIRST + AT_LAST:
        if name not in kept:
            setattr(part, name, None)


class StagedTransformer(Transformer):
    """A Transformer without the parameters of other processes' stages.

    `residual`, `cross_entropy` and `head` work as those of the whole model if every process of
    the pipeline calls them with the same arguments: the residual stream travels from stage to
    stage, and the last one's results to all. `at` makes them compute a single stage instead.
    """

    shapes: dict[str, torch.Size]
    everywhere: list[Stage]
    """the stages of all processes"""
    stages: list[Stage]
    """this process's stages"""
    group: Any
    """the processes of the pipeline"""
    current: Stage | None = None
    """the stage that is computed; None: all, and the results are exchanged"""
    received: Tensor | None = None
    """the residual stream before the current stage, unless it is the first"""
    passed_on: Tensor | None = None
    """the residual stream after the current stage"""
    stream_dtype: torch.dtype = torch.float32
    """dtype of the residual stream between stages"""

    def parameter_shapes(self) -> dict[str, torch.Size]:
        return self.shapes

    @contextmanager
    def at(self, stage: Stage, received: Tensor | None) -> Iterator[None]:
        """Computes only this stage inside the `with` block."""
        self.current, self.received = stage, received
        try:
            yield
        finally:
            self.current = self.received = self.passed_on = None

    def stream_shape(self, rows: int, time: int) -> tuple[int, ...]:
        """Shape of the residual stream between stages, for ids [rows, time]."""
        # Tensor-parallel processes may share its positions.
        part = self.stream.part(torch.empty(rows, time, 1, device="meta"))
        return *part.shape[:2], self.config.dim

    def residual(self, ids: Tensor, *args: Any, **options: Any) -> Tensor:
        if self.current is not None:
            return self._stage_residual(ids, *args, **options)
        x = None
        for stage in self.stages:
            if not stage.first:
                shape = self.stream_shape(*ids.shape)
                x = torch.empty(shape, dtype=self.stream_dtype, device=ids.device)
                dist.recv(x, group=self.group, group_src=self._holder(stage.number - 1))
            with self.at(stage, x):
                x = self._stage_residual(ids, *args, **options)
            if not stage.last:
                dist.send(x, group=self.group, group_dst=self._holder(stage.number + 1))
        assert x is not None
        return x

    def _stage_residual(self, ids: Tensor, *args: Any, **options: Any) -> Tensor:
        """The residual stream after the current stage."""
        assert self.current is not None
        x = super().residual(ids, *args, **options)
        self.passed_on = x if self.current.last else x.to(self.stream_dtype)
        return self.passed_on

    def _embedded(self, ids: Tensor, added: Tensor | None) -> Tensor:
        assert self.current is not None
        if self.current.first:
            return super()._embedded(ids, added)
        assert self.received is not None
        return self.received

    def _whole(self, x: Tensor, time: int) -> Tensor:
        assert self.current is not None
        return super()._whole(x, time) if self.current.last else x

    def _numbered_blocks(self) -> Iterable[tuple[int, nn.Module]]:
        assert self.current is not None
        return ((n, self.blocks.get_submodule(str(n))) for n in self.current.blocks)

    @property
    def computes_loss(self) -> bool:
        return self.current is None or self.current.last

    def cross_entropy(
        self, residual: Tensor, targets: Tensor, *, z_loss: float = 0.0, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Zeros on stages before the last one, inside `at`."""
        found = residual.new_zeros(2, dtype=torch.float32)
        if (self.current or self.stages[-1]).last:
            loss, z = super().cross_entropy(residual, targets, z_loss=z_loss, chunk=chunk)
            if self.current is not None:
                return loss, z
            found = torch.stack([loss, z]).float()
        loss, z = self._of_last_stage(found) if self.current is None else found
        return loss, z

    def head(self, residual: Tensor) -> Tensor:
        if self.stages[-1].last:
            logits = super().head(residual)
        else:
            shape = *residual.shape[:-1], self.config.vocab_size
            logits = residual.new_empty(shape, dtype=torch.float32)
        return self._of_last_stage(logits)

    def from_its_stage(self, name: str, value: Tensor | None) -> Tensor:
        """A parameter on all processes of the pipeline, from the first one that has it."""
        if value is None:
            like = next(self.parameters())
            value = torch.empty(self.shapes[name], dtype=like.dtype, device=like.device)
        kind, *path = name.split(".")
        number = self.everywhere[-1].number
        if kind in AT_FIRST:
            number = 0
        elif kind == "blocks":
            number = next(s.number for s in self.everywhere if int(path[0]) in s.blocks)
        return self._broadcast(value, self._holder(number))

    def _of_last_stage(self, value: Tensor) -> Tensor:
        """The last stage's value on all processes of the pipeline; without gradients."""
        return self._broadcast(value, self._holder(self.everywhere[-1].number))

    def _broadcast(self, value: Tensor, process: int) -> Tensor:
        value = value.detach().contiguous()
        dist.broadcast(value, group=self.group, group_src=process)
        return value

    def _holder(self, number: int) -> int:
        """The process of a stage, by its place in the pipeline."""
        return number % dist.get_world_size(self.group)


def counted_once(model: nn.Module, name: str) -> bool:
    """Whether this process's parameter is the one to save and to count in the gradient's norm.

    False for the last stage's copy of a tied table.
    """
    if not isinstance(model, StagedTransformer):
        return True
    return name != TABLE or model.stages[0].first
