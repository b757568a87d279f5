"""The warning before step 1: a run that needs more memory than its device has, and what helps.

Only tensors are counted (plan/memory.py), so a run that comes close may still run out of memory.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from openpalm.plan.devices import GIB
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import step_memory
from openpalm.plan.training import RECOMPUTE, Training

if TYPE_CHECKING:
    from openpalm.model.config import ModelConfig
    from openpalm.train.batch_shape import BatchShape
    from openpalm.train.config import TrainSettings

LEAST_CHUNK = 1024
"""Positions of a loss chunk that is offered as a remedy."""


def planned(
    settings: "TrainSettings", config: "ModelConfig", shape: "BatchShape", dtype: str
) -> Training:
    """The training that the settings of a run describe."""
    return Training(
        config,
        shape.sequence_length,
        shape.rows,
        shape.accumulation,
        optimizer=settings.optim.kind,
        dtype="float32" if dtype == "float32" else "bfloat16",
        recompute=settings.memory.recompute,
        reshard=settings.parallel.reshard,
        loss_chunk=settings.memory.loss_chunk,
        lora=settings.lora.config(config),
        trained_layers=settings.last_layers,
    )


def warn_if_too_large(
    training: Training, available: float, *, cuda: bool, layout: Layout | None = None
) -> str | None:
    """One line if the training needs more than the `available` bytes, with remedies, or None."""
    layout = layout or Layout()
    needed = step_memory(training, layout, cuda=cuda).total
    if needed <= available:
        return None

    def fits(changed: Training) -> bool:
        return step_memory(changed, layout, cuda=cuda).total <= available

    remedies = [words for words, changed in _remedies(training) if fits(changed)]
    device = "GPU" if cuda else "machine" if layout.size == 1 else "process"
    said = f"needs about {needed / GIB:.3g} GiB of the {available / GIB:.3g} GiB of this {device}"
    if remedies:
        return f"{said}; take {' or '.join(remedies[:3])}"
    least = replace(training, recompute="full", rows=1, loss_chunk=LEAST_CHUNK)
    least_gib = f"{step_memory(least, layout, cuda=cuda).total / GIB:.3g} GiB"
    adapter = "" if training.lora else " or --lora.rank 16"
    return f"{said}, and {least_gib} at least; take a smaller model{adapter}"


def _remedies(training: Training) -> Iterator[tuple[str, Training]]:
    """Options that need less memory, alone and then together, and the training with them."""
    least = replace(training, recompute="full")
    if training.recompute not in ("full", "offload"):
        for way in RECOMPUTE[RECOMPUTE.index(training.recompute) + 1 : 3]:
            yield f"--memory.recompute {way}", replace(training, recompute=way)
    rows = training.rows // 2
    while rows >= 1:
        fewer = replace(training, rows=rows, accumulation=2)
        yield f"--microbatch-tokens {fewer.tokens}", fewer
        rows //= 2
    if training.loss_chunk is None:
        chunk = f"--memory.loss-chunk {LEAST_CHUNK}"
        yield chunk, replace(training, loss_chunk=LEAST_CHUNK)
        least = replace(least, loss_chunk=LEAST_CHUNK)
    if training.rows > 1:
        options = f"--memory.recompute full with --microbatch-tokens {training.context}"
        yield options, replace(least, rows=1, accumulation=2, loss_chunk=training.loss_chunk)
