"""The processes of a run: rank and size, sums and agreements between them, and their mesh.

Small values travel over a gloo group of their own, on the CPU, whatever carries the tensors.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from openpalm.base.launcher import launched
from openpalm.errors import OpenPalmError, SettingsError, WorkError
from openpalm.parallel.config import AXES, Axes, ParallelSettings, axes_of
from openpalm.parallel.meeting import meet

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long processes wait for the main one while it saves, reads or evaluates: a watchdog with the
step's time limit would end runs whose checkpoints are large. A process that dies is noticed."""

_RENDEZVOUS_S = 15.0
"""Added to the time limit for a rendezvous that never answers."""


@dataclass(frozen=True)
class World:
    """Rank and number of processes, one by default, and their places on the mesh."""

    rank: int = 0
    size: int = 1
    axes: Axes = field(default_factory=Axes)
    mesh: DeviceMesh | None = None
    """mesh with the axes AXES; None for one process"""
    control: Any = None
    """gloo group of all processes, for small values"""
    patient: Any = None
    """the same, to wait for slow work of the main process"""
    saving: Any = None
    """the same, for the thread that saves checkpoints"""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to the user."""
        return self.rank == 0

    @property
    def coordinate(self) -> dict[str, int]:
        return self.axes.coordinate(self.rank)

    @property
    def data_rank(self) -> int:
        """Number of this process among those that read different rows of a batch."""
        place = self.coordinate
        return place["replicate"] * self.axes.shard + place["shard"]

    @property
    def data_size(self) -> int:
        """Number of processes that read different rows of a batch."""
        return self.axes.data

    @property
    def contributes(self) -> bool:
        """Whether this process's numbers enter sums: one of those that compute the same numbers.

        Of tensor-parallel processes the first, of a pipeline the last stage, which has the loss.
        """
        place = self.coordinate
        return place["tensor"] == 0 and place["pipeline"] == self.axes.pipeline - 1

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all processes that see different data."""
        if self.size == 1:
            return [float(value) for value in values]
        return self._reduced([v if self.contributes else 0.0 for v in values], dist.ReduceOp.SUM)

    def sums_over_all(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all processes, also over those that see the same data."""
        return list(values) if self.size == 1 else self._reduced(values, dist.ReduceOp.SUM)

    def sum(self, value: float) -> float:
        """The sum of `value` over all processes that see different data."""
        return self.sums([value])[0]

    def max(self, value: float) -> float:
        """The largest `value` of any process."""
        return self.maxima([value])[0]

    def maxima(self, values: Sequence[float]) -> list[float]:
        """The largest of any process, for each of the `values`."""
        return list(values) if self.size == 1 else self._reduced(values, dist.ReduceOp.MAX)

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any process."""
        return bool(self.max(float(value)))

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.control)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; any object that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def broadcast(self, value: T) -> T:
        """The main process's value, which the others may wait for as long as it takes."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls the function on the main process; every process returns, or raises, its result."""
        if self.size == 1:
            return function()
        value, error = _outcome(function) if self.is_main else (None, None)
        value, sent = self.broadcast((value, _portable(error)))
        error = error or sent
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Calls the function on every process; if it fails on one, all of them raise that error."""
        if self.size == 1:
            return function()
        value, error = _outcome(function)
        failed = [(rank, e) for rank, e in enumerate(self.gather(_portable(error))) if e]
        if failed:
            raise failed[0][1] if error is None else error
        return value  # type: ignore[return-value]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one with its text if it may not travel to other processes."""
    if error is None or isinstance(error, (OpenPalmError, OSError)):
        return error
    return WorkError(f"{type(error).__name__}: {error}")


_current = World()


def world() -> World:
    """The world that `join` made; one process before that."""
    return _current


def join(settings: ParallelSettings, device: torch.device) -> World:
    """Joins the processes that the launcher started, and cuts them into the settings' axes.

    A second call only changes the axes. Raises SettingsError for axes with another product than the
    number of processes, or if the launcher's variables are missing.
    """
    global _current
    rank, size = launched()
    axes = axes_of(settings, size)
    if size == 1:
        _current = World()
        return _current
    wait = timedelta(seconds=settings.timeout_s)
    if not dist.is_initialized():
        _initialise(device, wait)
    if _current.size == size and _current.axes == axes:
        return _current
    control = dist.new_group(backend="gloo", timeout=wait)
    # Before the mesh: processes that cut it differently would wait for each other's groups.
    _refuse_other_axes(World(rank, size, axes, control=control))
    mesh = init_device_mesh(device.type, axes.sizes, mesh_dim_names=AXES)
    patient, saving = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    _current = World(rank, size, axes, mesh, control, patient, saving)
    return _current


def _refuse_other_axes(here: World) -> None:
    everyone = here.gather(str(here.axes))
    for rank, axes in enumerate(everyone):
        if axes != everyone[0]:
            raise SettingsError(
                f"--parallel: {axes} on process {rank}, {everyone[0]} on process 0; start all "
                "processes with the same command"
            )


def leave() -> None:
    """Ends this process's membership; only tests need it before the process ends."""
    global _current
    _current = World()
    if dist.is_initialized():
        dist.destroy_process_group()


def _initialise(device: torch.device, wait: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    own = device if device.type == "cuda" else None
    store, rank, size = _rendezvous(wait)
    store.set_timeout(wait)
    store = meet(store, rank, size, wait.total_seconds())
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=wait, device_id=own
    )


def _rendezvous(wait: timedelta) -> tuple[Store, int, int]:
    """The launcher's store, rank and size. Raises SettingsError or WorkError."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(next(iter(rendezvous("env://", timeout=wait))))
        except (ValueError, dist.DistError) as error:
            found.append(error)

    # In a thread, because torch waits without a limit if another program listens at the port.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    # torch tries several times, each within the limit.
    thread.join(2 * wait.total_seconds() + _RENDEZVOUS_S)
    result = found[0] if found else None
    if isinstance(result, tuple):
        return result
    if isinstance(result, ValueError):
        raise SettingsError(
            f"WORLD_SIZE is set but the processes cannot find each other ({result}); start them "
            "with torchrun or srun"
        )
    where, port, size = (os.environ[n] for n in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
    said = str(result or "what listens there does not answer").partition("\n")[0].rstrip(".")
    if "EADDRINUSE" in said:
        raise WorkError(
            f"port {port} of this machine (MASTER_PORT) is used by another program, perhaps "
            "another run; choose a free one"
        )
    raise WorkError(
        f"not all {size} processes (WORLD_SIZE) met at {where} (MASTER_ADDR), port {port}, within "
        f"{wait.total_seconds():g} s: {said}; start all of them "
        "with torchrun or srun, or unset these variables to run one process"
    )
