"""Objectives (loss functions): the Objective protocol, next-token prediction, loader protocols.

An objective SUMS over the batch. The trainer divides by a count over all microbatches and all
processes, so that k microbatches, or n processes, give the gradient of one whole batch.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.model.layout import packed_layout
from openpalm.model.transformer import Transformer
from openpalm.parallel.context import ContextSplit

Metrics = dict[str, float]
B = TypeVar("B", contravariant=True)


class Objective(Protocol[B]):
    def count(self, batch: B, /) -> int:
        """The number of tokens, pairs or completions over which the loss is averaged."""
        ...

    def loss(self, model: Transformer, batch: B, /) -> tuple[Tensor, Metrics]:
        """The loss SUMMED over the batch, a scalar, and further sums to report.

        The sums are divided by the count. An objective may name other divisors, which are metrics
        of their own and not reported, in an attribute `ratios`.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token in nats, for pretraining and masked fine-tuning."""

    z_loss: float = 0.0
    """z-loss coefficient; the reported loss does not include it"""
    chunk: int | None = None
    """positions whose logits are in memory at once; None: as many as are fast"""
    context: ContextSplit | None = None
    """how several processes share each row; None: this process computes whole rows"""
    last: bool = False
    """also report last_loss, the mean loss at the last position of the rows that count it"""
    ratios: ClassVar[dict[str, str]] = {"last_loss": "last_rows"}

    def count(self, batch: Batch, /) -> int:
        targets = batch.targets if self.context is None else self.context.part(batch).targets
        return int((targets != IGNORE).sum())

    def loss(self, model: Transformer, batch: Batch, /) -> tuple[Tensor, Metrics]:
        ends = torch.zeros_like(batch.targets)
        ends[:, -1] = 1
        if self.context is not None:
            ends = self.context.part(replace(batch, targets=ends)).targets
            layout, batch = self.context.layout(batch), self.context.part(batch)
        else:
            layout = None if batch.segments is None else packed_layout(batch.segments)
        targets, places = batch.targets.flatten(), None
        counts = targets != IGNORE
        if not counts.all():
            places = counts.nonzero()[:, 0]
            targets = targets[places]
        states = model.residual(batch.inputs, layout=layout, selected=places)
        loss, z = model.cross_entropy(
            states.flatten(0, -2), targets, z_loss=self.z_loss, chunk=self.chunk
        )
        metrics = {"z_loss": z.item()} if self.z_loss else {}
        if self.last:
            at_end = (ends.flatten() if places is None else ends.flatten()[places]) == 1
            metrics |= self._last(model, states.flatten(0, -2), targets, at_end)
        return loss, metrics

    @torch.no_grad()
    def _last(self, model: Transformer, states: Tensor, targets: Tensor, ends: Tensor) -> Metrics:
        """Sums for last_loss, by the head on the states where `ends` is True.

        Zeros where this process has none: other positions of the rows, or another pipeline stage.
        """
        if not (model.computes_loss and ends.any()):
            return {"last_loss": 0.0, "last_rows": 0.0}
        loss, _ = model.cross_entropy(states[ends], targets[ends], chunk=self.chunk)
        return {"last_loss": loss.item(), "last_rows": float(ends.sum())}


class Loader(Protocol):
    """An endless iterator of microbatches, with a cursor that can be saved."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that makes its batches while training and must save tensors: rollouts."""

    facts: dict[str, float]
    """metrics of the newest batches"""

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...
