"""Runs a function on several processes that can talk to each other (gloo), and collects results.

Processes are spawned, not forked, once for all tests of a session; each call has a time limit.
The function must be at the top level of its module; arguments and results are pickled. It runs
with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set, as under torchrun.
"""

import atexit
import importlib.util
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ports import free_port

_workers: list[Any] = []
LIMIT_S = 120.0


def on_ranks(size: int, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list:
    """The results of `function(*args)` on each of `size` processes, by rank.

    An error on any of them raises AssertionError with its traceback.
    """
    while len(_workers) < size:
        _workers.append(_start())
    port = free_port()
    name = getattr(function, "__qualname__", "")
    task = (Path(function.__code__.co_filename), name, args)
    for rank in range(size):
        _workers[rank][1].send((rank, size, port, task))
    results, errors = [], []
    for rank in range(size):
        process, pipe = _workers[rank]
        if not pipe.poll(limit_s):
            stop()
            raise AssertionError(f"rank {rank} of {name} did not end within {limit_s} s; {errors}")
        try:
            good, value = pipe.recv()
        except EOFError:
            process.join(5)
            stop()
            raise AssertionError(f"rank {rank} of {name} died ({process.exitcode})") from None
        if good:
            results.append(value)
        else:
            errors.append(f"rank {rank}: {value}")
            limit_s = min(limit_s, 15)  # the others may wait for it
    if errors:
        stop()  # the next test gets processes in a known state
        raise AssertionError("\n".join(errors))
    return results


def stop() -> None:
    """Ends all processes."""
    while _workers:
        process, pipe = _workers.pop()
        pipe.close()
        process.kill()
        process.join()


atexit.register(stop)


def _start() -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, size, port, task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _run(rank, size, port, *task)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _run(rank: int, size: int, port: int, file: Path, name: str, args: tuple) -> Any:
    import torch

    from openpalm.parallel.world import leave

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.manual_seed(0)
    try:
        return getattr(_module(file), name)(*args)
    finally:
        leave()


def _module(file: Path) -> Any:
    """The module of that file, imported by its path: a test's folder is no package."""
    name = f"on_ranks_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
