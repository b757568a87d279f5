"""Probes: measurements of the model while it trains, such as validation loss and samples.

`train` imports neither `evaluate` nor `generate`: probes that need them are made there
(evaluate/probes.py). Here is the one that every objective can have: its loss on held-out data.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from openpalm.model.transformer import Transformer
from openpalm.parallel.context import context_split
from openpalm.parallel.world import world
from openpalm.train.objective import Metrics, NextToken, Objective

if TYPE_CHECKING:  # it brings all of torch's sharding, which a server's start need not wait for
    from openpalm.train.trainer import Trainer

Rows = list[dict[str, Any]]
B = TypeVar("B")


@dataclass(frozen=True)
class Probe:
    """A measurement taken every `eval_every` steps, or its own, and after the last step."""

    measure: Callable[[Transformer, torch.dtype], dict[str, Any]]
    """columns of a row, from the model and the dtype of the run's arithmetic"""
    file: str = "metrics.jsonl"
    """file of the run directory that gets the row"""
    describe: Callable[[dict[str, Any]], str] | None = None
    """the row as one line for the terminal"""
    alarm: Callable[[Rows], str | None] | None = None
    """the reason why the run must stop, from all its rows so far, or None"""
    every: int | None = None
    """steps between two measurements; None is the run's `eval_every`"""
    tokens: int | None = None
    """tokens whose loss is computed, if the probe does nothing else: its time can be predicted"""
    generates: bool = False
    """whether it generates text: the main process then measures, on a model that is not sharded"""

    def taken(self, trainer: "Trainer") -> dict[str, Any] | None:
        """The columns of a row, or None if no process has room; all of a run must call it."""
        if not self.generates:
            trainer.model.eval()
            return self.measure(trainer.model, trainer.dtype)
        if not trainer.fits_whole():
            return None
        model = trainer.gathered()

        def on_whole_model() -> dict[str, Any]:
            assert model is not None
            return self.measure(model, trainer.dtype)

        return trainer.world.on_main(on_whole_model)


@dataclass(frozen=True)
class BestBy:
    """The evaluation column that decides which checkpoint is the best one."""

    column: str = "val_loss"
    highest: bool = False
    always: bool = False
    """whether the best checkpoint is kept without --keep-best, too"""

    def step(
        self, rows: Rows, steps: set[int], alarm: Callable[[Rows], str | None] = lambda rows: None
    ) -> int | None:
        """The best of `steps` by the run's rows, except those for which `alarm` has a reason.

        Of equal values the first is the best. None if none of the steps has a finite value.
        """
        rows = [row for row in rows if _is_finite(row.get(self.column))]
        # An alarm judges the rows up to its step, so each row is judged with those before it.
        known = [
            row for n, row in enumerate(rows, 1) if row["step"] in steps and not alarm(rows[:n])
        ]
        sign = -1 if self.highest else 1
        return min(known, key=lambda row: sign * row[self.column])["step"] if known else None


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def held_out_probe(
    objective: Objective[Any],
    batches: Sequence[Any],
    describe: Callable[[dict[str, Any]], str],
    *,
    more: Callable[[Transformer], Metrics] = lambda model: {},
) -> Probe:
    """Mean loss and metrics of an objective on held-out batches, as columns val_NAME.

    `more` gives further columns; it runs without gradients, in the dtype of the run.
    """

    def measure(model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
        sums, count = held_out_sums(model, objective, batches, dtype)
        means = {f"val_{name}": value / count for name, value in sums.items()}
        with torch.no_grad(), _autocast(model, dtype):
            return means | more(model)

    return Probe(measure, describe=describe)


@torch.no_grad()
def held_out_sums(
    model: Transformer, objective: Objective[Any], batches: Iterable[Any], dtype: torch.dtype
) -> tuple[Metrics, int]:
    """The loss and the metrics, each summed over the batches, and the objective's count.

    The processes of a run share the batches; all must call it.
    """
    model.eval()
    sums, count, here = Metrics(), 0, world()
    if isinstance(objective, NextToken):
        objective = replace(objective, context=context_split(here))
    for batch, counts in _own_share(batches, here.data_rank, here.data_size):
        with _autocast(model, dtype):
            loss, metrics = model(objective.loss, batch.to(model.device))
        for name, value in {"loss": loss.item(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value * counts
        count += objective.count(batch) * counts
    # With another objective, processes that share every sequence all have it whole here.
    counted = isinstance(objective, NextToken) or here.coordinate["context"] == 0
    count, *values = here.sums([number * counted for number in (count, *sums.values())])
    return dict(zip(sums, values, strict=True)), round(count)


def _own_share(batches: Iterable[B], rank: int, size: int) -> Iterator[tuple[B, bool]]:
    """Every size-th batch, and whether it counts.

    All processes of a sharded model compute equally often: one that has no batch left computes one
    that does not count.
    """
    for group in _grouped(batches, size):
        yield (group[rank], True) if rank < len(group) else (group[0], False)


def _grouped(items: Iterable[B], size: int) -> Iterator[list[B]]:
    """The items in groups of `size`; the last may have fewer."""
    rest = iter(items)
    while group := list(islice(rest, size)):
        yield group


def _autocast(model: Transformer, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(model.device.type, dtype, dtype != torch.float32)
