"""The worker process: takes jobs from the database and runs them, one thread for each slot."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from django.conf import settings
from django.db import DatabaseError, Error, InterfaceError, OperationalError, connections

from openpalm.base.files import is_disk_full
from openpalm.errors import OpenPalmError, one_line
from openpalm.feedback.models import Job
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.handlers import end_left_over, enqueue_due_statistics, handler
from openpalm.feedback.worker.identity import worker_name
from openpalm.feedback.worker.progress import JobStopped, Progress, WorkerEnds

POLL_S = 0.5
FULL_DISK_PAUSE_S = 10.0
HEARTBEAT_S = 3.0
STATISTICS_EVERY_S = 10.0
"""figures are at most about this old, as long as no other job takes longer"""
log = logging.getLogger(__name__)


class Worker:
    """Runs jobs until `ending` is set. Several workers may share a database."""

    def __init__(self, name: str | None = None):
        self.name = name or worker_name()
        self.ending = threading.Event()

    def run(self) -> None:
        """Returns when `ending` is set and every job is done, or waits again."""
        threads = [
            threading.Thread(target=self._run_slot, args=(kinds,), name=slot)
            for slot, kinds in jobs.SLOTS.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_slot(self, kinds: tuple[str, ...]) -> None:
        next_look = 0.0
        try:
            while not self.ending.is_set():
                if self._safely(lambda: self.run_one(kinds)):
                    continue
                if "statistics" in kinds and time.monotonic() > next_look:
                    next_look = time.monotonic() + STATISTICS_EVERY_S
                    self._safely(lambda: bool(end_left_over()))
                    if self._safely(lambda: bool(enqueue_due_statistics())):
                        continue
                self.ending.wait(POLL_S)
        except Exception:
            # Without this thread its jobs would wait for ever: a new worker begins.
            log.exception("the worker ends")
            self.ending.set()
        finally:
            connections.close_all()

    def _safely(self, work: Callable[[], bool]) -> bool:
        """A database that is away for a while ends no worker."""
        try:
            return work()
        except Error as error:
            log.warning("database: %s; trying again", one_line(error))
            connections.close_all()
            self.ending.wait(2.0)
            return False

    def run_one(self, kinds: tuple[str, ...]) -> bool:
        """Runs the oldest waiting job; False if there is none."""
        job = jobs.take(self.name, kinds)
        if job is None:
            return False
        progress = Progress(job, self.ending)
        with _heartbeat(job, progress):
            self._run_job(job, progress)
        return True

    def _run_job(self, job: Job, progress: Progress) -> None:
        try:
            result = handler(job.kind)(job, progress) or {}
        except WorkerEnds:
            jobs.give_back(job)
        except JobStopped:
            pass  # its state says so already
        except (OperationalError, InterfaceError):
            raise  # away, or its disk is full: the job is taken up when its heartbeat is old
        except (OpenPalmError, DatabaseError, OSError) as error:
            if is_disk_full(error):
                self._wait_for_space(job, error)
            else:
                jobs.finish(job, Job.State.FAILED, message=one_line(error))
        except Exception as error:
            # A bug: the line is for the page, the traceback for the worker's log.
            log.exception("job %s", job.pk)
            line = f"{type(error).__name__}: {one_line(error, 500)}"
            jobs.finish(job, Job.State.FAILED, message=f"{line} (the worker's log says where)")
        else:
            jobs.finish(job, Job.State.DONE, result=result)

    def _wait_for_space(self, job: Job, error: Exception) -> None:
        """Puts the job back: it continues by itself when somebody has made room."""
        line = f"the disk is full ({one_line(error)}); it continues when there is room"
        log.warning("job %s: %s", job.pk, line)
        jobs.give_back(job, line)
        self.ending.wait(FULL_DISK_PAUSE_S)


@contextmanager
def _heartbeat(job: Job, progress: Progress):
    """Tells every few seconds that the worker lives, also while the handler waits for others."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            try:
                if not jobs.beat(job):
                    progress.lost.set()
                    break
            except Error:  # the next beat may reach it
                connections.close_all()
        connections.close_all()

    # Without threads of its own in tests, in which SQLite is in memory and one transaction.
    if getattr(settings, "FEEDBACK_HEARTBEAT", True):
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    else:
        yield


def drain(*kinds: str) -> int:
    """Runs all waiting jobs in this thread, for tests and scripts; returns how many."""
    worker, count = Worker(), 0
    while worker.run_one(kinds or jobs.KINDS):
        count += 1
    return count
