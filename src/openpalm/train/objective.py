"""What a run minimises: the Objective protocol, and next-token prediction.

An objective SUMS over the batch; the trainer divides by a count taken over all microbatches and
all processes, so that k microbatches, or n processes, give the gradient of one whole batch.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.model.layout import packed_layout
from openpalm.model.transformer import Transformer

Metrics = dict[str, float]
B = TypeVar("B", contravariant=True)


class Objective(Protocol[B]):
    def count(self, batch: B, /) -> int:
        """What the loss averages over: tokens, pairs, responses."""
        ...

    def loss(self, model: Transformer, batch: B, /) -> tuple[Tensor, Metrics]:
        """The loss SUMMED over the batch, a scalar, and sums to report beside it."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of the next token in nats: pretraining, and fine-tuning by its mask."""

    z_loss: float = 0.0
    """weight of log^2 Z in the gradient; the loss itself is reported without it"""
    chunk: int | None = None
    """positions whose logits are in memory at a time; not set takes as many as are quick"""

    def count(self, batch: Batch, /) -> int:
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: Transformer, batch: Batch, /) -> tuple[Tensor, Metrics]:
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
        return loss, {"z_loss": z.item()} if self.z_loss else {}


class Loader(Protocol):
    """Endless microbatches, and where it stands."""

    def __next__(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class StatefulLoader(Protocol):
    """What a loader has besides, whose batches are made on the way: rollouts."""

    facts: dict[str, float]
    """about the newest batches, for the log"""

    def state_tensors(self) -> dict[str, Tensor]: ...

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...
