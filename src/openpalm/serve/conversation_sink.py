"""Sends conversations whose users agreed to it to another server, one at a time, in a thread."""

import json
import queue
import sys
import threading
import urllib.request
from typing import Any

from openpalm.errors import SettingsError

WAITING_AT_MOST = 1000
TIMEOUT_S = 10
ATTEMPTS = 3


class ConversationSink:
    """POSTs each record as JSON to `url`; where that fails for long, records are dropped, counted.

    Raises SettingsError for what is no http(s) URL.
    """

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"--conversation-url {url}: must be an http:// or https:// URL")
        self.url = url
        self.sent = 0
        self.dropped = 0
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING_AT_MOST)
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Never waits: with too many unsent, this one is dropped."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """Sends what is waiting, as far as the time allows."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            if any(self._send(record) for _ in range(ATTEMPTS)):
                self.sent += 1
                continue
            self.dropped += 1
            if self.dropped == 1:
                print(f"openpalm: warning: {self.url} takes no conversations", file=sys.stderr)

    def _send(self, record: dict[str, Any]) -> bool:
        body = json.dumps(record).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return True
        except (OSError, ValueError):
            return False
