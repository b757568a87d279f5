"""A run that continues with another number of processes reads every row of its data exactly once,
and the batches of later epochs are those of one process that was never interrupted."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rank_runs import LIMIT_S, call, in_step, rank
from train_samples import write_dataset

from openpalm.data.batches.loader import Batch
from openpalm.data.batches.order import Cursor
from openpalm.train.trainer import Trainer
from ranks import on_ranks

STEPS, CUT, ROWS = 30, 19, 40
"""an epoch has about fourteen steps, so that the run is cut in the second and ends in the third"""
OPTIONS = {"steps": STEPS, "batch_tokens": ROWS * 16, "eval_every": STEPS, "save_every": STEPS}


def reading(
    out: Path, data: Path, stop_at: int | None
) -> tuple[int, dict[int, list[int]], dict[int, list[list[int]]]]:
    """The exit status, and by step the rows that this process drew and the tokens in them."""
    drawn: dict[int, list[int]] = {}
    seen: dict[int, list[list[int]]] = {}
    take, learn = Cursor.take, Trainer.forward_backward

    def taken(self: Cursor) -> range:
        found = take(self)
        drawn.setdefault(found[0] // ROWS + 1, []).extend(found)
        return found

    def learned(self: Trainer, batches: list[Batch]) -> Any:
        for batch in batches:
            seen.setdefault(self.step + 1, []).extend(batch.inputs.tolist())
        return learn(self, batches)

    def fault(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Cursor, "take", taken)
        patch.setattr(Trainer, "forward_backward", learned)
        if stop_at and rank() == 0:
            in_step(patch, stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))

    status, _ = call(out, data, fault, OPTIONS | {"arch.dropout": 0})
    return status, drawn, seen


def merged(found: list[Any], part: int) -> dict[int, list[Any]]:
    """What all processes have under each step, in one order."""
    every: dict[int, list[Any]] = {}
    for process in found:
        for step, values in process[part].items():
            every.setdefault(step, []).extend(values)
    return {step: sorted(values) for step, values in every.items()}


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_another_number_of_processes_reads_every_row_once(tmp_path: Path, before: int, after: int):
    data = write_dataset(tmp_path / "plain")
    alone = [reading(tmp_path / "alone", data, None)]
    first = on_ranks(before, reading, tmp_path / "run", data, CUT, limit_s=LIMIT_S)
    second = on_ranks(after, reading, tmp_path / "run", data, None, limit_s=LIMIT_S)
    assert [found[0] for found in (*alone, *first, *second)] == [0, *[143] * before, *[0] * after]
    assert set(merged(first, 1)) == set(range(1, CUT + 1))
    rows = merged(first, 1) | merged(second, 1)
    assert rows == {n: list(range((n - 1) * ROWS, n * ROWS)) for n in range(1, STEPS + 1)}
    assert set(merged(first, 1)) & set(merged(second, 1)) == set()
    assert merged(first, 2) | merged(second, 2) == merged(alone, 2)
