"""Runs several processes as one command: starts them, restarts those that crash, ends all.

Does not import Django: a child has a name, a command line and a readiness check.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from openpalm.errors import WorkError
from openpalm.feedback.die_with_parent import die_with_parent

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STABLE_S = 60.0
"""after a run of this length the next pause is FIRST_PAUSE_S again"""
END_S = 90.0
POLL_S = 0.1
USAGE_STATUS = 2


@dataclass
class Child:
    """A process of the command."""

    name: str
    command: Callable[[], Sequence[str]]
    """the command line, asked for at each start"""
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True
    sockets: Sequence[int] = ()
    """file descriptors that it inherits"""
    hides_output: bool = False
    """drop its standard output; the supervisor prints the ready line itself"""
    process: subprocess.Popen[bytes] | None = None
    pause_s: float = field(default_factory=lambda: FIRST_PAUSE_S)
    """before the next start after a crash"""
    started_at: float = 0.0
    starts_at: float = 0.0

    def start(self) -> None:
        self.process = subprocess.Popen(
            list(self.command()),
            env=os.environ | dict(self.environment),
            stdin=subprocess.DEVNULL,
            # The one line on standard output is the supervisor's.
            stdout=subprocess.DEVNULL if self.hides_output else sys.stderr,
            pass_fds=self.sockets,
            start_new_session=True,  # Ctrl-C reaches the supervisor only, which ends all in order
            preexec_fn=die_with_parent,
        )
        self.started_at = time.monotonic()

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


class Supervisor:
    """Starts the children in order; each waits until the one before it is ready."""

    def __init__(self, children: Sequence[Child], *, say: Callable[[str], None]):
        self.children = children
        self.say = say
        self.signals: list[int] = []

    def run(self, ready: Callable[[], None], ending: Callable[[], None] = lambda: None) -> None:
        """Returns after SIGTERM or Ctrl-C, when all children have ended.

        `ready` is called once, when all are ready, and `ending` before all are ended.
        Raises WorkError if a child ends before it was ever ready: it would fail again.
        """
        old = {
            number: signal.signal(number, lambda caught, frame: self.signals.append(caught))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            for child in self.children:
                self._start_first(child)
            if not self.signals:
                ready()
            while not self.signals:
                for child in self.children:
                    self._watch(child)
                time.sleep(POLL_S)
        finally:
            ending()
            self._end_all()
            for number, handler in old.items():
                signal.signal(number, handler)

    def _start_first(self, child: Child) -> None:
        if self.signals:
            return
        child.start()
        while not self.signals and not child.ready():
            process = child.process
            assert process is not None
            if process.poll() is not None:
                # The child has printed its own error above.
                error = WorkError(f"the {child.name} ended before it was ready; see above")
                error.exit_status = USAGE_STATUS if process.returncode == USAGE_STATUS else 1
                raise error
            time.sleep(POLL_S)

    def _watch(self, child: Child) -> None:
        """Starts a crashed child again, after a pause that doubles."""
        process, now = child.process, time.monotonic()
        if process is not None and process.poll() is not None:
            if now - child.started_at > STABLE_S:
                child.pause_s = FIRST_PAUSE_S
            child.process, child.starts_at = None, now + child.pause_s
            self.say(
                f"the {child.name} {_how(process.returncode)}; it starts again in "
                f"{child.pause_s:g} s"
            )
            child.pause_s = min(2 * child.pause_s, LONGEST_PAUSE_S)
        elif process is None and now >= child.starts_at:
            child.start()

    def _end_all(self) -> None:
        """Asks all to end; a further signal is passed on, and after END_S they are killed."""
        seen = len(self.signals)
        for child in self.children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while any(child.process and child.process.poll() is None for child in self.children):
            if time.monotonic() > deadline:
                for child in self.children:
                    child.signal(signal.SIGKILL)
            if len(self.signals) > seen:
                seen = len(self.signals)
                deadline = min(deadline, time.monotonic() + 10)
                for child in self.children:
                    child.signal(signal.SIGTERM)
            time.sleep(POLL_S)


def _how(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def answers(url: str, host: str | None = None) -> Callable[[], bool]:
    """Whether a GET of this address succeeds now; `host` is the name that the site answers to."""
    request = urllib.request.Request(url, headers={"Host": host} if host else {})

    def look() -> bool:
        try:
            with urllib.request.urlopen(request, timeout=2) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError):
            return False

    return look
