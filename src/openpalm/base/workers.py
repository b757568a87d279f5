"""Thread pool: maps work over several cores, with results in the order of the tasks.

Threads suffice: apart from parsing, the work is done by libraries that release the GIL.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

PARALLELISM = "TOKENIZERS_PARALLELISM"


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Runs `map` on `count` threads, with a bounded number of tasks and results in memory."""

    def __init__(self, pool: ThreadPoolExecutor, count: int):
        self._pool, self._count = pool, count

    def map(self, work: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """work(task) for each task, in order; the first error in that order is raised."""
        waiting: deque[Future[R]] = deque()
        for task in tasks:
            waiting.append(self._pool.submit(work, task))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def working(count: int | None) -> Iterator[Workers]:
    """A pool of `count` threads (None: all cores); each encodes on its own."""
    count = count or available_cores()
    before = os.environ.get(PARALLELISM)
    # The tokenizers library would use all cores for every batch, whatever `count` is.
    os.environ[PARALLELISM] = "false"
    pool = ThreadPoolExecutor(count)
    try:
        yield Workers(pool, count)
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
