"""Processes that meet in a store which still holds the words of earlier, dead ones."""

import threading
import time

import pytest
import torch.distributed as dist

from openpalm.errors import TrainingError
from openpalm.parallel.meeting import meet

SIZE = 3


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False)


def test_every_attempt_sees_only_its_own_words(server: dist.TCPStore):
    server.set("hello/1", "dead")  # it was killed before process 0 came
    for attempt in range(SIZE):
        found: dict[int, bytes] = {}

        def join(rank: int, attempt: int = attempt, found: dict[int, bytes] = found) -> None:
            time.sleep(0.05 * ((rank + attempt) % SIZE))  # each is the last one once
            store = meet(client(server), rank, SIZE, 60.0)
            store.set(f"address/{rank}", str(attempt))
            found[rank] = store.get(f"address/{(rank + 1) % SIZE}")

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(SIZE), str(attempt).encode())


def test_one_that_never_comes_is_named(server: dist.TCPStore):
    server.set("hello/1", "dead")
    with pytest.raises(TrainingError, match=r"processes \[1\] did not start within 0\.2 s"):
        meet(client(server), 0, 2, 0.2)
    with pytest.raises(TrainingError, match=r"process 0 did not start within 0\.2 s"):
        meet(client(server), 1, 2, 0.2)
