"""Starts `openpalm serve` in its own process, as a user does."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANGS_S = 600
"""after which a test that waits has failed: no bound on speed"""
KEYLESS = {"OPENPALM_API_KEY", "OPENPALM_ADMIN_KEY"}


@dataclass
class Answer:
    status: int
    body: Any
    headers: Mapping[str, str]


@dataclass
class Running:
    """A server that takes requests."""

    url: str
    process: subprocess.Popen

    def call(
        self,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        raw: bytes | None = None,
        method: str | None = None,
    ) -> Answer:
        """GET, or POST with a body. Returns JSON parsed, other content as text."""
        data = json.dumps(body).encode() if raw is None and body is not None else raw
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=HANGS_S) as response:
                return _answer(response.status, response)
        except urllib.error.HTTPError as error:
            return _answer(error.code, error)

    def metric(self, name: str) -> float:
        """The value of a Prometheus line."""
        text = self.call("/metrics").body
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def wait_idle(self, timeout_s: float = HANGS_S) -> None:
        """Waits until no sequence is in flight."""
        deadline = time.monotonic() + timeout_s
        while self.metric("openpalm_sequences_in_flight") + self.metric(
            "openpalm_sequences_running"
        ):
            assert time.monotonic() < deadline, "sequences are still in flight"
            time.sleep(0.01)

    def stop(self, timeout_s: float = HANGS_S) -> tuple[int, str]:
        """Sends SIGTERM. Returns the exit status and standard error."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, errors


@contextmanager
def serving(
    run: Path,
    *options: object,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "openpalm"),
) -> Iterator[Running]:
    """`openpalm serve RUN OPTIONS` on a free port of this machine."""
    environment = {k: v for k, v in os.environ.items() if k not in KEYLESS}
    environment |= {"OMP_NUM_THREADS": "1"} | dict(env or {})
    words = [sys.executable, *program, "serve", run, "--port", 0, *options]
    with subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+?(?=/[,\s])", line)
            if not found:
                process.kill()
                raise AssertionError(f"no server: {line}{process.stderr.read()}")
            yield Running(found[0], process)
        finally:
            if process.poll() is None:
                process.kill()


def _answer(status: int, response: Any) -> Answer:
    content = response.read().decode()
    kind = response.headers.get("Content-Type", "")
    return Answer(status, json.loads(content) if "json" in kind else content, response.headers)


def events(text: str) -> list[Any]:
    """The data of server-sent events, [DONE] left as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass
class Call:
    """What came back of one asynchronous call."""

    status: int
    body: str
    headers: dict[str, str]
    """by names in small letters"""

    @property
    def text(self) -> str:
        """The streamed text of a completion."""
        parts = [item for item in events(self.body) if item != "[DONE]"]
        return "".join(choice["text"] for part in parts for choice in part["choices"])


async def call_async(
    url: str, path: str, body: object, *, leave_after: int | None = None, key: str | None = None
) -> Call:
    """POSTs; with `leave_after` hangs up after so many lines of the answer's body."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    head += f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n"
    try:
        writer.write(head.encode() + content)
        if leave_after == 0:
            await writer.drain()
            return Call(0, "", {})
        status = int((await reader.readline()).split()[1])
        headers = {}
        while header := (await reader.readline()).decode().strip():
            name, _, value = header.partition(": ")
            headers[name.lower()] = value
        lines = []
        async for line in reader:
            if line.startswith((b"data:", b"{", b"[")) or not lines:
                lines.append(line.decode())
            if leave_after and len(lines) >= leave_after:
                break
        return Call(status, _unchunked(lines), headers)
    finally:
        writer.close()


def _unchunked(lines: list[str]) -> str:
    """Without the sizes of chunks, which no line of ours looks like."""
    return "".join(line for line in lines if line.startswith(("data:", "{", "[")))
