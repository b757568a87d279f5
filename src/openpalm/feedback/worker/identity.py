"""Names of processes that stay true after their number is used again: number and time of start."""

import hashlib
import os
import socket
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path


def started(pid: int) -> str | None:
    """When the process began, in the system's own spelling; None if it has ended.

    A process that has ended but was not collected by its parent counts as ended.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if Path("/proc/self").exists() else _started_by_ps(pid)
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return None if fields[0] in "ZX" else fields[19]


def _started_by_ps(pid: int) -> str | None:
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, start = found.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else start.strip()


def is_running(pid: int, since: str | None) -> bool:
    return since is not None and started(pid) == since


@cache
def host() -> str:
    """Where numbers of processes mean something: containers of one host name have their own."""
    name, where = socket.gethostname(), []
    with suppress(OSError):
        where.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        where.append(os.readlink("/proc/self/ns/pid"))
    digest = hashlib.sha256("\0".join([name, *where]).encode()).hexdigest()
    return f"{name[:20]}-{digest[:8]}".replace(":", "-")


def worker_name() -> str:
    """host:pid:start of this process."""
    return f"{host()}:{os.getpid()}:{started(os.getpid())}"


def is_gone(worker: str) -> bool:
    """Whether the worker ran on this machine and has ended. Of others only the heartbeat tells."""
    name, _, rest = worker.partition(":")
    pid, _, since = rest.partition(":")
    return name == host() and pid.isdigit() and not is_running(int(pid), since)
