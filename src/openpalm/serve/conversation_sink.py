"""Posts conversations that their users agreed to share to another server, from a thread."""

import json
import os
import queue
import sys
import threading
from typing import Any

import httpx2

from openpalm.errors import SettingsError

MAX_WAITING = 1000
TIMEOUT_S = 10
ATTEMPTS = 3
TOKEN = "OPENPALM_CONVERSATION_TOKEN"
"""environment variable with the bearer token that the receiver wants"""


class ConversationSink:
    """Posts each conversation to `url` as JSON, one at a time.

    A conversation that cannot be delivered, or that finds too many waiting, is dropped and counted.
    Sends the token of OPENPALM_CONVERSATION_TOKEN, if it is set. Raises SettingsError if `url` is
    not an http(s) URL.
    """

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"--conversation-url {url}: must be an http:// or https:// URL")
        self.url = url
        self._headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN, "").strip():
            if not token.isascii() or not token.isprintable():
                raise SettingsError(f"{TOKEN}: must be printable ASCII, as HTTP headers are")
            self._headers["Authorization"] = f"Bearer {token}"
        self.sent = 0
        self.dropped = 0
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="conversations", daemon=True)
        self._thread.start()

    def put(self, conversation: dict[str, Any]) -> None:
        """Returns at once. If too many are waiting, this one is dropped."""
        try:
            self._waiting.put_nowait(conversation)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """Sends the conversations that wait, as many as the time allows."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        with httpx2.Client(timeout=TIMEOUT_S) as client:
            while (conversation := self._waiting.get()) is not None:
                if any(self._send(client, conversation) for _ in range(ATTEMPTS)):
                    self.sent += 1
                    continue
                self.dropped += 1
                if self.dropped == 1:
                    message = f"{self.url} takes no conversations; they are dropped"
                    print(f"openpalm: warning: {message}", file=sys.stderr)

    def _send(self, client: httpx2.Client, conversation: dict[str, Any]) -> bool:
        content = json.dumps(conversation)
        try:
            client.post(self.url, content=content, headers=self._headers).raise_for_status()
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError):
            return False
        return True
