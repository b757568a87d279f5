"""A client of the REST API for labelers.

It repeats a request that got no answer. Those of labelers are repeatable: a lease is shown again, a
second submission returns the first response.
"""

import time
from typing import Any
from urllib.parse import quote

import httpx2

from openpalm.base.console import shown
from openpalm.errors import SettingsError, WorkError

TIMEOUT_S = 60.0
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class FeedbackClient:
    """Calls `url`/api/v1 with a token; waits up to `patience_s` for a server that is away."""

    def __init__(self, url: str, token: str, *, patience_s: float = 60.0):
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"--url {url}: must be an http:// or https:// URL")
        self._client = httpx2.Client(
            base_url=f"{url.rstrip('/')}/api/v1/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
        )
        self._patience_s = patience_s
        self.repeated = 0
        """requests that got no answer and were sent again"""

    def close(self) -> None:
        self._client.close()

    def next(self, project: str) -> dict[str, Any] | None:
        """The assignment to judge now; None if nothing is left for this user."""
        return self.call("POST", f"projects/{quote(project, safe='')}/next")["assignment"]

    def submit(
        self, assignment: int, payload: dict[str, Any], elapsed_ms: int | None = None
    ) -> dict[str, Any]:
        """Stores a judgement; its payload numbers the candidates as shown."""
        body = {"payload": payload} | ({} if elapsed_ms is None else {"elapsed_ms": elapsed_ms})
        return self.call("POST", f"assignments/{assignment}/submit", body)["response"]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of the answer. Raises WorkError if the API refuses or stays away."""
        give_up, wait = time.monotonic() + self._patience_s, FIRST_WAIT_S
        while True:
            try:
                answer = self._client.request(method, path, json=body or {})
                if answer.status_code < 502:
                    return _read(answer)
                reason = f"HTTP {answer.status_code}"
            except httpx2.TransportError as error:
                reason = f"{error}" or type(error).__name__
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise WorkError(f"{self._client.base_url}: {error}") from None
            if time.monotonic() + wait > give_up:
                raise WorkError(f"{self._client.base_url} does not answer: {reason}")
            self.repeated += 1
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)


def _read(answer: httpx2.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        value = None
    if answer.is_success and isinstance(value, dict):
        return value
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    reason = shown(message)[1:-1] if isinstance(message, str) else "not a site of feedback"
    raise WorkError(f"{answer.request.url}: HTTP {answer.status_code}: {reason}")
