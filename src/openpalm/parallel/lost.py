"""Names the process that hangs, failed or ended, when communication between processes fails.

The errors of gloo and NCCL do not say which process is missing. So each process that gets one
writes a report to the launcher's store; the processes without a report are the missing ones.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from openpalm.errors import OpenPalmError, TrainingError
from openpalm.parallel.world import World

_BROKEN = (
    "connection closed by peer",
    "connection reset",
    "connection timed out",
    "broken pipe",
    "timed out waiting",
    "timeout caused pair closure",
    "gloo",
)
"""in the messages of RuntimeErrors that gloo raises, which has no type of its own"""
_LATE = ("timed out", "timeout")
_REPORTS_S = 5.0
"""Longest wait for other processes' reports; all notice the same fault at nearly the same time."""
_STORE_S = 3.0
"""Longest time to reach the store, which may be on a machine that is cut off."""


@dataclass(frozen=True)
class _Report:
    late: bool
    """whether this process waited for its whole time limit"""
    failed: str = ""
    """its own error, where it did not fail by waiting"""


@dataclass
class Reached:
    """Where the run is."""

    step: Callable[[], int] = lambda: 0
    """number of the step in progress"""

    def __str__(self) -> str:
        return f"step {step}" if (step := self.step()) else "before step 1"


@contextmanager
def lost_processes_named(here: World, timeout_s: float) -> Iterator[Reached]:
    """Turns an error of communication in the block into a TrainingError that names the process."""
    reached = Reached()
    if here.size == 1:
        yield reached
        return
    store = _Store(here)
    store.write("place", f"pid {os.getpid()} on {socket.gethostname()}")
    try:
        yield reached
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, OpenPalmError):
            store.write("report", _Report(False, str(error)).__dict__)
            raise
        _end_without_waiting()
        if not _is_broken(error):
            store.write("report", _Report(False, said).__dict__)
            raise
        late = any(word in said.lower() for word in _LATE)
        store.write("report", _Report(late).__dict__)
        raise TrainingError(_message(here, store, late, timeout_s, reached)) from error


def _is_broken(error: Exception) -> bool:
    said = str(error).lower()
    known = isinstance(error, RuntimeError) and any(words in said for words in _BROKEN)
    return known or isinstance(error, dist.DistError)


def _message(here: World, store: "_Store", late: bool, timeout_s: float, at: Reached) -> str:
    reports = {rank: _Report(**found) for rank, found in store.reports().items()}
    again = "run the same command again to continue from the last checkpoint"
    failed = {rank: report.failed for rank, report in reports.items() if report.failed}
    if failed:
        rank, why = next(iter(failed.items()))
        return f"{at}: process {rank} failed: {why}"
    missing = [rank for rank in range(here.size) if rank not in reports]
    if not reports:
        return (
            f"{at}: this machine ({socket.gethostname()}) has lost the other processes and "
            f"the launcher's store; check the network between the machines, and {again}"
        )
    if not missing:
        return f"{at}: the processes lost their connections to each other; {again}"
    late = late or any(report.late for report in reports.values())
    what = f"did not arrive within {timeout_s:g} s" if late else "ended"
    named = ", ".join(f"{rank} ({store.read(rank, 'place') or 'unknown'})" for rank in missing)
    noun = "process" if len(missing) == 1 else "processes"
    return f"{at}: {noun} {named} {what}; {again}"


class _Store:
    """The launcher's store. It may be out of reach, so every access has a time limit."""

    def __init__(self, here: World):
        self._here, self._store = here, _get_default_store()
        self._gone = False

    def write(self, name: str, value: Any) -> None:
        key, text = f"{name}/{self._here.rank}", json.dumps(value)
        self._call(lambda: self._store.set(key, text))

    def read(self, rank: int, name: str) -> Any:
        key = f"{name}/{rank}"
        found = self._call(lambda: self._store.get(key) if self._store.check([key]) else None)
        return None if found is None else json.loads(found)

    def _call(self, access: Callable[[], Any]) -> Any:
        """The result of an access; None if it fails or takes too long, as all later ones do."""
        box: list[Any] = []

        def run() -> None:
            with suppress(Exception):  # of the transport, which has no types of its own
                box.append(access())

        if not self._gone:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(_STORE_S)
            self._gone = not box
        return box[0] if box else None

    def reports(self) -> dict[int, Any]:
        """The reports by rank, once all are there or the time for them is over.

        Empty if not even this process's own can be read.
        """
        found: dict[int, Any] = {}
        deadline = time.monotonic() + _REPORTS_S
        while len(found) < self._here.size and time.monotonic() < deadline:
            for rank in set(range(self._here.size)) - set(found):
                report = self.read(rank, "report")
                if report is not None:
                    found[rank] = report
            if self._here.rank not in found:
                return {}
            time.sleep(0.1)
        return found


def _end_without_waiting() -> None:
    """Lets the process end while communication is under way that will never be complete.

    The interpreter would wait for it at its end, for as long as its time limit says.
    """

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    atexit.register(end)
