"""Lets the processes of one attempt of a run find each other in the launcher's store.

torchrun keeps one store over its restarts, with the addresses that processes of earlier attempts
left there. A new process that reads one waits for a dead one until its time limit. The number of
restarts cannot tell attempts apart: every machine's launcher counts its own.
"""

import time
import uuid

from torch.distributed.distributed_c10d import PrefixStore, Store

from openpalm.errors import TrainingError


def meet(store: Store, rank: int, size: int, limit_s: float) -> Store:
    """The part of the store that only the processes of this attempt use.

    Process 0 makes its name and gives it to every process that says hello, dead ones included; only
    the living ones confirm it. Raises TrainingError if one does not within the time limit.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + limit_s
    if rank == 0:
        missing = set(range(1, size))
        while missing:
            for other in sorted(missing):
                if store.check([f"confirmed/{own}/{other}"]):
                    missing.remove(other)
                elif store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
            _wait(deadline, limit_s, f"processes {sorted(missing)} did" if missing else "")
        return PrefixStore(own, store)
    store.set(f"hello/{rank}", own)
    while not store.check([f"welcome/{own}"]):
        _wait(deadline, limit_s, "process 0 did")
    name = store.get(f"welcome/{own}").decode()
    store.set(f"confirmed/{name}/{rank}", "")
    return PrefixStore(name, store)


def _wait(deadline: float, limit_s: float, who: str) -> None:
    if who and time.monotonic() > deadline:
        raise TrainingError(f"before step 1: {who} not start within {limit_s:g} s")
    time.sleep(0.01)
