"""Cuts the batch of a step into the microbatches of each process."""

import math
from typing import TYPE_CHECKING

from openpalm.errors import SettingsError
from openpalm.parallel.config import fills_pipeline
from openpalm.train.batch_shape import BatchShape, Ramp

if TYPE_CHECKING:
    from openpalm.train.config import TrainSettings

DEFAULT_SEQUENCES = 16
"""Sequences of a batch, of all processes: a run may resume on another number of them."""


def batch_shape(settings: "TrainSettings", sequence_length: int, processes: int = 1) -> BatchShape:
    """Cuts the global batch into microbatches. Raises SettingsError if it does not divide."""
    wanted = settings.batch_tokens or DEFAULT_SEQUENCES * sequence_length
    least = sequence_length * processes
    if wanted % least:
        near = [
            tokens for tokens in (wanted // least * least, -(-wanted // least) * least) if tokens
        ]
        raise SettingsError(
            f"--batch-tokens {wanted}: must be a multiple of sequence_length x processes "
            f"({sequence_length} x {processes}); use {' or '.join(map(str, near))}"
        )
    sequences = wanted // (sequence_length * processes)
    ramp = Ramp.parse(settings.batch_ramp)
    parts = [sequences * share for share, _ in ramp.stages]
    if any(part.denominator > 1 for part in parts):
        multiple = math.lcm(*(share.denominator for share, _ in ramp.stages))
        raise SettingsError(
            f"--batch-ramp {settings.batch_ramp}: does not cut {sequences} sequences a process "
            f"whole; take --batch-tokens a multiple of {multiple * sequence_length * processes}"
        )
    room = max(1, settings.microbatch_tokens // sequence_length)
    whole = math.gcd(sequences, *(int(part) for part in parts))
    rows = max(r for r in range(1, min(room, whole) + 1) if whole % r == 0)
    return BatchShape(sequence_length, rows, sequences // rows, ramp, processes)


def check_pipeline(settings: "TrainSettings", shape: BatchShape) -> None:
    """Raises SettingsError unless every step has enough microbatches for the pipeline."""
    processes, schedule = settings.parallel.pipeline, settings.parallel.schedule
    ramp = Ramp.parse(settings.batch_ramp)
    sizes = [*(int(shape.sequences * share) for share, _ in ramp.stages), shape.sequences]

    def fills(rows: int) -> bool:
        return all(
            size % rows == 0 and fills_pipeline(size // rows, processes, schedule) for size in sizes
        )

    if processes == 1 or fills(shape.rows):
        return
    fitting = [rows for rows in range(shape.rows, 0, -1) if fills(rows)]
    if fitting:
        remedy = f"--microbatch-tokens {fitting[0] * shape.sequence_length}"
    else:
        each = processes * math.lcm(*(share.denominator for share, _ in ramp.stages))
        remedy = f"--batch-tokens a multiple of {each * shape.sequence_length * shape.processes}"
    numbers = " or ".join(str(size // shape.rows) for size in sizes)
    numbers += " microbatch" if numbers == "1" else " microbatches"
    equal = " in equal rounds" if schedule == "interleaved" else ""
    raise SettingsError(
        f"--microbatch-tokens {settings.microbatch_tokens}: a step has {numbers}, but "
        f"--parallel.pipeline {processes} needs {processes} or more{equal}; take {remedy}"
    )
