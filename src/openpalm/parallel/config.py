"""Settings of parallel training, and the axes that they cut a number of processes into."""

import math
from dataclasses import dataclass
from typing import Literal

from openpalm.base.settings import check
from openpalm.errors import SettingsError

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""The axes of the mesh, outermost first: neighbouring processes share the fastest links."""


@dataclass(frozen=True)
class ParallelSettings:
    """Training on several processes (torchrun); the product of the axes is their number.

    A resumed run may have others.
    """

    shard: int | None = None
    """processes that share weights, gradients and optimizer state between them (FSDP); default:
    as many as are left"""
    replicate: int | None = None
    """copies of the sharded weights (HSDP), or of the whole weights with --parallel.shard 1 (data
    parallelism); default 1"""
    tensor: int = 1
    """processes that share every matrix multiplication (tensor parallelism)"""
    context: int = 1
    """processes that share every sequence (context parallelism)"""
    pipeline: int = 1
    """processes that share the blocks (pipeline parallelism); for `train`"""
    sequence: bool = True
    """with --parallel.tensor: also share the activations between the blocks (sequence
    parallelism)"""
    reshard: bool = True
    """free gathered weights after each block's forward pass and gather them again for the backward
    pass (ZeRO-3); false needs more memory and communicates less (ZeRO-2)"""
    schedule: Literal["1f1b", "interleaved", "gpipe"] = "1f1b"
    """order of the microbatches in a pipeline; interleaved gives every process two stages"""
    timeout_s: float = 600.0
    """seconds after which a process that waits for others ends the run"""
    grace_s: float = 25.0
    """seconds after SIGTERM or SIGINT in which all processes save; then they end, saved or not.
    torchrun kills them after 30 (its --shutdown-timeout)"""

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            check(value is None or value >= 1, f"parallel.{name}", value, "1 or more")
        for name in ("timeout_s", "grace_s"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"parallel.{name}", value, "above 0 and finite")


@dataclass(frozen=True)
class Axes:
    """Processes along each axis of the mesh."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return tuple(getattr(self, name) for name in AXES)

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def data(self) -> int:
        """Processes that read different rows of a batch."""
        return self.replicate * self.shard

    @property
    def averaged(self) -> int:
        """Processes over which FSDP averages gradients: each sees other tokens."""
        return self.data * self.context

    def coordinate(self, rank: int) -> dict[str, int]:
        """The place of a process on each axis."""
        found: dict[str, int] = {}
        for name in reversed(AXES):
            rank, found[name] = divmod(rank, getattr(self, name))
        return found

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "one process"


def fills_pipeline(microbatches: int, processes: int, schedule: str) -> bool:
    """Whether a pipeline of this many processes can run this many microbatches in a step.

    Interleaved stages take them in equal rounds of at least as many microbatches as processes.
    """
    rounds = microbatches // processes
    return rounds > 0 and (schedule != "interleaved" or microbatches % rounds == 0)


def axes_of(settings: ParallelSettings, processes: int) -> Axes:
    """The axes of this number of processes; those that are not given are inferred.

    Raises SettingsError, with the possible products, if the given ones do not divide it.
    """
    given = {name: value for name in AXES if (value := getattr(settings, name)) is not None}
    product = math.prod(given.values())
    left, rest = divmod(processes, product)
    if rest or (left > 1 and "shard" in given and "replicate" in given):
        named = " x ".join(f"{name} {value}" for name, value in given.items() if value > 1)
        if processes == 1:
            raise SettingsError(
                f"--parallel: {named} needs {product} processes, and this is one; start it "
                f"as torchrun --nproc-per-node {product} -m openpalm ..."
            )
        listed = ", ".join(str(n) for n in divisors(processes))
        raise SettingsError(
            f"--parallel: {named} cannot make {processes} processes; the product of the axes must "
            f"be {processes}, so each is one of {listed}"
        )
    missing = "shard" if "shard" not in given else "replicate"
    return Axes(**(given | ({missing: left} if missing not in given else {})))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
