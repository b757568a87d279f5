"""Starts `openpalm feedback` in its own process, as a person does, and can kill and restart it."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

HANGS_S = 300
"""after which a test that waits has failed: no bound on speed"""
OURS = ("DATABASE_URL", "DJANGO_SETTINGS_MODULE", "OPENPALM_")
"""names of variables that a site must not take over from its tests' environment"""


@dataclass
class Site:
    """A site at one address, whichever process serves it."""

    folder: Path
    environment: Mapping[str, str]
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns once the site answers and reaches its database."""
        words = ["feedback", "--port", str(self.port), "--dir", str(self.folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "openpalm", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + HANGS_S
        while not self.is_healthy():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal and waits. Returns the exit status."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(timeout=HANGS_S)

    def kill(self) -> None:
        """kill -9: the process has no chance to finish anything."""
        self.stop(signal.SIGKILL)

    def manage(self, *words: str) -> str:
        """What `openpalm feedback manage WORDS` prints for this site."""
        done = subprocess.run(
            [sys.executable, "-m", "openpalm", "feedback", "manage", *words],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=HANGS_S) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    @property
    def log(self) -> Path:
        return self.folder / "site.log"

    def said(self) -> str:
        """What all its processes have printed."""
        return self.log.read_text(encoding="utf-8")


@contextmanager
def feedback_site(folder: Path, database_url: str | None = None) -> Iterator[Site]:
    """A running site with an empty database: SQLite in `folder`, or the named one."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
    environment |= {"OPENPALM_FEEDBACK_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    if database_url:
        environment["DATABASE_URL"] = database_url
    site = Site(folder, environment, free_port())
    try:
        site.start()
        yield site
    finally:
        if site.process and site.process.poll() is None:
            site.kill()


def children_of(pid: int) -> dict[str, int]:
    """Process numbers by their part: web, worker."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if parent == pid and "feedback" in words:
            found[words[words.index("feedback") + 1]] = int(entry.name)
    return found
