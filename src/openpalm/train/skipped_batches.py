"""Keeps the batches of steps that were skipped because the loss or gradient is not finite.

    RUN/skipped/step-NNNNNNNN-rank-R.safetensors    tensors of process R's microbatches, by number

The first few of a run only: a run that diverges skips many steps.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from openpalm.checkpoint import tensors
from openpalm.parallel.world import World

FOLDER = "skipped"
KEPT = 3


def keep_batches(
    out: Path, world: World, step: int, batches: Sequence[Any], loss: float
) -> str | None:
    """Writes the batches of each process that has a `loss` that is not finite; says where.

    If no process has one, the gradient of any of them may be the cause, so all write. All processes
    must call it. None once enough are kept.
    """
    folder = out / FOLDER
    # Several processes may compute the same loss: one of them reports it.
    gathered = world.gather(loss if world.contributes else None)
    losses = {rank: own for rank, own in enumerate(gathered) if own is not None}
    bad = [rank for rank, own in losses.items() if not math.isfinite(own)]
    names = {rank: f"step-{step:08d}-rank-{rank}.safetensors" for rank in bad or losses}

    def chosen() -> list[int]:
        others = {file.name for file in folder.glob("*.safetensors")} - set(names.values())
        return list(names)[: max(0, KEPT - len(others))]

    kept = world.on_main(chosen)
    failed = ""
    if world.rank in kept:
        failed = _write(folder / names[world.rank], step, batches)
    failures = [text for text in world.gather(failed) if text]
    which = ", ".join(map(str, bad))
    on = f"on process {which}" if bad and world.size > 1 else ""
    if failures:
        return f"{on}; its batch cannot be kept: {failures[0]}".removeprefix("; ")
    if not kept:
        return on or None
    where = ", ".join(str(folder / names[rank]) for rank in kept)
    return f"{on}; its batch is kept in {where}".removeprefix("; ")


def _write(path: Path, step: int, batches: Sequence[Any]) -> str:
    """Writes the file; returns the reason if that fails: it must not end the run."""
    found: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        found.update(_tensors(f"microbatch-{number}", batch))
    try:
        path.parent.mkdir(exist_ok=True)
        tensors.write(path, found, {"step": str(step)})
    except Exception as error:
        if (refused := tensors.refusal(error)) is None:
            raise
        return f"{path} ({refused})"
    return ""


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a batch of any kind, named by the fields that lead to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(f"{name}/{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _tensors(f"{name}/{number}", inner)
