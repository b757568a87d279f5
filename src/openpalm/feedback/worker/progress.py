"""Progress of a running job: what it reports, and whether it must stop."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from django.db import connection, transaction

from openpalm.feedback.models import Job
from openpalm.feedback.worker import jobs

REPORT_EVERY_S = 0.5
PAUSE_AFTER_S, PAUSE_S = 0.1, 0.15
"""SQLite has one writer, and others look every 0.1 s whether they may write. They would never find
it free if transactions followed each other at once."""
Writing = Callable[[], AbstractContextManager[None]]
"""a transaction to store things in: Progress.writing in a job, transaction.atomic elsewhere"""


class JobStopped(Exception):
    """A person stopped the job, or another worker has it."""


class WorkerEnds(Exception):
    """The worker ends; the job waits for the next one."""


class Progress:
    """Stores progress at most twice a second.

    `check` raises JobStopped or WorkerEnds; every method calls it, so a handler that reports its
    progress can be stopped.
    """

    def __init__(self, job: Job, ending: threading.Event | None = None):
        self.job = job
        self.lost = threading.Event()
        """set when a heartbeat found that the job is no longer this worker's"""
        self._ending = ending or threading.Event()
        self._reported_at = 0.0
        self._written_s = 0.0
        self._done = job.done

    def check(self) -> None:
        if self._ending.is_set():
            raise WorkerEnds
        if self.lost.is_set():
            raise JobStopped

    def say(self, message: str) -> None:
        """Stores at once what the job does now."""
        self.job.message = message
        self._report()

    def start(self, total: int, message: str = "") -> None:
        """Sets the number of things to do; what an earlier attempt has done is counted again.

        The page shows what the earlier attempt reached until this one is further.
        """
        self._done = 0
        if total != self.job.total:
            self.job.done, self.job.total = 0, total
        self.say(message or self.job.message)

    def advance(self, count: int = 1, message: str | None = None) -> None:
        """Counts so many more things as done."""
        self.move_to(self._done + count, message=message)

    def move_to(self, done: int, total: int | None = None, message: str | None = None) -> None:
        self._done = done
        # Progress: the limit is for a job that kills its worker at the same place each time.
        is_further = done > self.job.done and self.job.attempts > 1
        if is_further:
            self.job.attempts = 1
        self.job.done = max(done, self.job.done)
        self.job.total = self.job.total if total is None else total
        self.job.message = self.job.message if message is None else message
        if is_further or time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._report()
        else:
            self.check()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction for what the job makes. Raises JobStopped if it is no longer this worker's.

        Everything that a handler stores is stored in one, so that a worker that was frozen while
        another one took the job over stores nothing when it wakes.
        """
        started = time.monotonic()
        with transaction.atomic():
            if not jobs.is_own(self.job):
                self.lost.set()
                raise JobStopped
            yield
        self._leave_room(time.monotonic() - started)

    def _leave_room(self, written_s: float) -> None:
        """Pauses after long writing, so that labelers can judge: see PAUSE_S."""
        self._written_s += written_s
        if connection.vendor == "sqlite" and self._written_s > PAUSE_AFTER_S:
            self._written_s = 0.0
            time.sleep(PAUSE_S)

    def confirm(self) -> None:
        """Raises JobStopped if the job is no longer this worker's."""
        with self.writing():
            pass

    def keep(self, result: dict[str, Any]) -> None:
        """Stores the result with what the open transaction stores.

        A worker that is killed before the job's end leaves it to the next one, in `Job.result`.
        """
        Job.objects.filter(pk=self.job.pk).update(result=result)

    def quiet(self) -> "Progress":
        """Progress of a part of the work: it can stop the job, but stores no counts."""
        return _Quiet(self)

    def wait(self, seconds: float) -> None:
        """Sleeps, and wakes when the worker ends."""
        self.ends_within(seconds)
        self.check()

    def ends_within(self, seconds: float) -> bool:
        """Sleeps; returns whether the worker ends."""
        return self._ending.wait(seconds)

    def _report(self) -> None:
        self.check()
        self._reported_at = time.monotonic()
        if not jobs.report(self.job):
            self.lost.set()
        self.check()


class _Quiet(Progress):
    def __init__(self, whole: Progress):
        super().__init__(whole.job, whole._ending)
        self.lost = whole.lost

    def move_to(self, done: int, total: int | None = None, message: str | None = None) -> None:
        self.check()

    def start(self, total: int, message: str = "") -> None:
        self.check()
