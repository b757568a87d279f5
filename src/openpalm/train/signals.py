"""Signals that end a run: SIGINT and SIGTERM, from a user, a scheduler or the launcher.

The training loop looks for them between steps, so that every checkpoint is of a whole step. A
thread watches them too: while the main thread waits for other processes no Python handler can run.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from openpalm.parallel.world import World

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST_S = 5.0
"""Signals this close together are one request to several processes: a scheduler signals all, and
torchrun repeats what it receives to its workers."""


@contextmanager
def caught_signals(world: World, grace_s: float) -> Iterator[list[int]]:
    """Collects the signals, so that the run saves before it ends; a second one ends at once.

    On several processes the process also ends `grace_s` seconds after the first signal, saved or
    not: the launcher would kill it, without a word, soon after.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught and world.size == 1:
            end_by(number)
        caught.append(number)

    old = {number: signal.signal(number, catch) for number in _SIGNALS}
    watch = _Watch(grace_s, speaks=world.is_main) if world.size > 1 else None
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if watch is not None:
            watch.close()


def end_by(number: int) -> NoReturn:
    """Ends the process as the signal would, so that a shell or scheduler sees why it ended."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(_status(number))


def _status(number: int) -> int:
    """The exit status by which shells report an end by this signal."""
    return 128 + number


class _Watch:
    """A thread that learns of signals at once, wherever the main thread is."""

    def __init__(self, grace_s: float, *, speaks: bool):
        self._grace_s, self._speaks = grace_s, speaks
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # The interpreter writes each signal's number there from the handler in C.
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._follow, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _follow(self) -> None:
        first, began = 0, 0.0
        while True:
            left = max(0.0, began + self._grace_s - time.monotonic()) if first else None
            if not select.select([self._reading], [], [], left)[0]:
                self._end(first, f"not saved within {self._grace_s:g} s of the signal")
            received = os.read(self._reading, 1)
            if not received:  # closed: the run has ended
                return
            number = received[0]
            if number not in _SIGNALS:
                continue
            if first and time.monotonic() - began > _SAME_REQUEST_S:
                self._end(number, "a second signal")
            if not first:
                first, began = number, time.monotonic()

    def _end(self, number: int, why: str) -> NoReturn:
        if self._speaks:
            more = "the last checkpoint is complete: run the same command again to continue"
            print(f"openpalm: {why}: ended without saving; {more}", file=sys.stderr, flush=True)
        # The main thread may be waiting for a process that never answers.
        os._exit(_status(number))
