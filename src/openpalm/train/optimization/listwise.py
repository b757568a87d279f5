"""The base of the optimizers: whole lists of tensors in one update, parts of sharded ones.

Every process updates its own parts of the parameters, so that moments are sharded like them. What
an optimizer needs to know of whole tensors, their norms, is summed over the processes once a step.
"""

# pyright: reportPrivateImportUsage=false
# (torch's operations on lists have no public names; its own optimizers are made of them.)

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openpalm.model.sharding import local_part
from openpalm.train.optimization.shards import local_gradient, whole_norms, with_part

Moments = list[list[Tensor]]
"""For each slot of an optimizer, the parts of a chunk's moments on this process."""


@dataclass(frozen=True)
class Chunk:
    """Parameters of one group, with equal step counts, that are updated at a time."""

    group: dict[str, Any]
    step: int
    """number of this step, from 1"""
    owners: list[Tensor]
    """the model's parameters, which may be sharded"""
    parameters: list[Tensor]
    """their parts on this process"""
    gradients: list[Tensor]
    """the parts' gradients"""


class Listwise(torch.optim.Optimizer):
    """An optimizer that updates all parameters with equal step counts in one call.

    The state of a parameter is its moments and the number of its steps. With `offload` the moments
    are kept in the CPU's memory and copied to the parameter's device for the update of each tensor.
    """

    slots: ClassVar[tuple[str, ...]]
    """names of the moments; each has its parameter's shape"""
    needs_norms: ClassVar[bool] = False
    """whether `update` needs the norms of whole tensors that `advance` begins"""

    def __init__(self, params: Iterable[Any], lr: float, *, offload: bool = False, **defaults: Any):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0} | defaults)
        self.offload = offload

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        chunks = [*self._chunks()]
        if self.needs_norms and any(isinstance(p, DTensor) for c in chunks for p in c.owners):
            self._step_with_sums(chunks)
        else:
            for chunk in chunks:
                with self._moments(chunk) as moments:
                    norms = self.advance(chunk, moments) if self.needs_norms else []
                    self.update(chunk, moments, norms)
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the CPU's memory may still be under way

    def _step_with_sums(self, chunks: list[Chunk]) -> None:
        """The two halves of all updates, with one sum over the processes between them."""
        parts = list[Tensor]()
        for chunk in chunks:
            with self._moments(chunk) as moments:
                parts += self.advance(chunk, moments)
        norms = iter(whole_norms([p for chunk in chunks for p in chunk.owners], parts))
        for chunk in chunks:
            with self._moments(chunk) as moments:
                self.update(chunk, moments, [next(norms) for _ in chunk.owners])

    def _chunks(self) -> Iterator[Chunk]:
        for group in self.param_groups:
            for step, parameters in self._of_equal_age(group["params"]).items():
                for owners in self.cut(parameters):
                    parts = [local_part(p) for p in owners]
                    yield Chunk(group, step, owners, parts, [local_gradient(p) for p in owners])

    def cut(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        """The parameters by chunk."""
        # A CPU's cache holds one tensor and its moments, not all of them; so does a device that
        # borrows the moments from the CPU's memory.
        single = self.offload or parameters[0].device.type == "cpu"
        return [[p] for p in parameters] if single else [parameters]

    def _of_equal_age(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """The parameters with a gradient, by the number (from 1) of their next step."""
        ages = defaultdict[int, list[Tensor]](list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)  # on the CPU: read each step
                part = local_part(parameter)
                state |= {slot: self.kept(torch.zeros_like(part), parameter) for slot in self.slots}
            state["step"] += 1
            ages[int(state["step"])].append(parameter)
        return ages

    def kept(self, part: Tensor, parameter: Tensor) -> Tensor:
        """A moment of the parameter, from this process's part of it, where it is kept."""
        if not self.offload:
            return with_part(parameter, part.to(parameter.device))
        part = part.to("cpu")
        return with_part(parameter, part.pin_memory() if parameter.device.type == "cuda" else part)

    @contextmanager
    def _moments(self, chunk: Chunk) -> Iterator[Moments]:
        """The chunk's moments on its device, for changing them."""
        kept = [[local_part(self.state[p][slot]) for p in chunk.owners] for slot in self.slots]
        if not self.offload:
            yield kept
            return
        device = chunk.parameters[0].device
        lent = [[m.to(device, copy=True, non_blocking=True) for m in slot] for slot in kept]
        yield lent
        for home, moments in zip(kept, lent, strict=True):
            for to, moment in zip(home, moments, strict=True):
                to.copy_(moment, non_blocking=True)

    def advance(self, chunk: Chunk, moments: Moments) -> list[Tensor]:
        """The first half of an update: may change moments; returns a norm of each part."""
        raise NotImplementedError

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        """Changes parameters and moments in place.

        norms: of the whole tensors, where those that `advance` returned were of parts.
        """
        raise NotImplementedError
