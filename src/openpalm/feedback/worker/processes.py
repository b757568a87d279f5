"""Runs `openpalm VERB ...` in a process of its own, which outlives a killed worker.

The next worker recognises the process by number and time of start, waits for it, and runs the same
command again: a command that saves its progress continues or finds that it is done.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from openpalm.base.files import lock
from openpalm.feedback.die_with_parent import die_with_parent
from openpalm.feedback.worker.identity import is_running, started

PROGRAM = (sys.executable, "-m", "openpalm")
POLL_S = 0.25
END_S = 60.0
"""for a process to save and end after SIGTERM"""
LOG_TAIL = 16384
Check = Callable[[], None]


@dataclass(frozen=True)
class Running:
    """A process by its number and start, as TrainRun.process stores it."""

    pid: int
    since: str | None

    def to_json(self) -> dict[str, object]:
        return {"pid": self.pid, "started": self.since}

    @classmethod
    def from_json(cls, value: object) -> "Running | None":
        match value:
            case {"pid": int(pid), "started": str(since)}:
                return cls(pid, since)
        return None

    @property
    def alive(self) -> bool:
        return is_running(self.pid, self.since)

    def signal(self, number: int) -> None:
        """To its children too."""
        if self.alive:
            _signal_group(self.pid, number)


@dataclass
class Command:
    """A command line of openpalm, without the program, and where its output goes."""

    words: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    dies_with_us: bool = False
    """whether the process ends too when the worker is killed (on Linux)"""

    def start(self) -> subprocess.Popen[bytes]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*PROGRAM, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment or {}),
                start_new_session=True,  # Ctrl-C at the terminal ends it only through the worker
                preexec_fn=die_with_parent if self.dies_with_us else None,
            )

    def run(
        self,
        *,
        check: Check,
        remember: Callable[[Running], None] = lambda running: None,
        left_over: Running | None = None,
    ) -> int:
        """Waits for a process that an earlier worker left over, then runs the command.

        Returns the exit status. `check` is called several times a second; if it raises, the
        process is asked to save and end before the error is raised on.
        """
        if left_over is not None:
            wait_for(left_over, check)
        process = self.start()
        try:
            remember(Running(process.pid, started(process.pid)))
            while process.poll() is None:
                check()
                time.sleep(POLL_S)
        except BaseException:
            end(process)
            raise
        return process.returncode

    def failure(self, status: int) -> str:
        """One line: why the command failed, and where its log is."""
        line = self.last_line().removeprefix("openpalm: error: ") or f"status {status}"
        if status < 0:
            line = f"was ended by {signal.Signals(-status).name} (is there enough memory?): {line}"
        return f"openpalm {self.words[0]}: {line} (log: {self.log})"

    def last_line(self) -> str:
        """The reason of a failure: the log's last error, or else its last line."""
        lines = [line.strip() for line in last_lines(self.log)]
        errors = [line for line in lines if line.startswith("openpalm: error")]
        return (errors or lines or [""])[-1][:2000]


def wait_for(running: Running, check: Check) -> None:
    """Waits until a process that is no child of this one has ended."""
    try:
        while running.alive:
            check()
            time.sleep(POLL_S)
    except BaseException:
        _signal_group(running.pid, signal.SIGTERM)
        raise


def wait_until_unlocked(directory: Path, check: Check) -> None:
    """Waits until no process trains in a run's directory, also one that nobody remembers."""
    while directory.is_dir() and not _is_unlocked(directory):
        check()
        time.sleep(POLL_S)


def _is_unlocked(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        return lock(descriptor)
    finally:
        os.close(descriptor)


def end(process: subprocess.Popen[bytes], wait_s: float = END_S) -> None:
    """Asks the process and its children to end, and kills those that do not."""
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def last_lines(log: Path) -> list[str]:
    """The non-empty lines at the end of a log; a progress bar counts as one line."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL))
        lines = file.read().decode(errors="replace").split("\n")
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
        return [line for line in lines if line.strip()]
    return []
