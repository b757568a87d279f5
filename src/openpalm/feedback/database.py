"""Write transactions and texts that work on both SQLite and PostgreSQL."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connection, transaction

_turn = threading.Lock()


@contextmanager
def writing() -> Iterator[None]:
    """A transaction, or a savepoint in the one that is open; no thread waits for long.

    SQLite has one writer at a time, and a writer that waits looks again at growing intervals, so
    that some of many threads would wait for seconds. Here the threads of a process queue for a lock
    instead; SQLite's own waiting remains for other processes, such as the worker.
    """
    if connection.vendor != "sqlite" or connection.in_atomic_block:
        with transaction.atomic():
            yield
        return
    with _turn, transaction.atomic():
        yield


def storable(text: str) -> str:
    """The text with U+FFFD for NUL and for half surrogate pairs, which PostgreSQL refuses.

    A byte-level model sometimes generates them; a job must not fail because of that.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\ufffd")
