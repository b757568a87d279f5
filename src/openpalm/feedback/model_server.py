"""A client of a model server: the OpenAI API and the admin API of `openpalm serve`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
from django.conf import settings

from openpalm.errors import WorkError
from openpalm.feedback.database import storable

TIMEOUT_S = 600.0
QUICK = httpx2.Timeout(60.0, connect=5.0)
"""for answers that a page waits for, and between two pieces of a stream"""
COMPLETIONS = "/v1/chat/completions"
SERVED_FILE = "served.json"
"""what the server has by promotion, for the process that starts it again after a crash"""


class NoAnswerError(WorkError):
    """The server did not answer: whether it did what was asked is unknown."""


class ContextError(WorkError):
    """Prompt and `max_tokens` do not fit the model's context."""


@dataclass(frozen=True)
class ModelServer:
    """Its methods raise WorkError with the server's own reason.

    `max_tokens` of a completion is a limit: where the context leaves fewer tokens, the text ends
    with it.
    """

    url: str
    api_key: str = ""
    admin_key: str = ""
    checkpoint: str | None = None
    """path of the model that the site's server has to have; None: whichever it has"""

    def complete(self, body: dict[str, Any]) -> list[str]:
        """The texts of a chat completion."""
        try:
            answer = self._call("POST", COMPLETIONS, body, key=self.api_key)
        except ContextError:
            answer = self._call("POST", COMPLETIONS, _unlimited(body), key=self.api_key)
        with self._understood(COMPLETIONS):
            contents = [choice["message"]["content"] or "" for choice in answer["choices"]]
            return [storable(contents[0]), *map(storable, contents[1:])]

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The text of a chat completion, in pieces while it is generated."""
        try:
            yield from self._stream(body)
        except ContextError:
            yield from self._stream(_unlimited(body))

    def model_names(self) -> list[str]:
        """The names of all models in the API, adapters included."""
        return [name for name, _ in self._models()]

    def model_name(self) -> str:
        """The name of the base model in the API."""
        with self._understood("/v1/models"):
            return next(name for name, parent in self._models() if not parent)

    def replace_model(self, path: str, name: str) -> dict[str, Any]:
        """Serves another checkpoint; returns when new requests go to it."""
        url = "/admin/models"
        answer = self._call("POST", url, {"path": path, "name": name}, key=self.admin_key)
        with self._understood(url):
            return {"replaced": answer["replaced"]}

    def confirm(self) -> None:
        """Raises WorkError if another model was promoted since: answers would get a wrong name."""
        if self.checkpoint is not None and promoted_path() not in (None, self.checkpoint):
            raise WorkError(
                f"{self.url}: another project has promoted a model meanwhile; start this again"
            )

    def _models(self) -> list[tuple[str, Any]]:
        answer = self._call("GET", "/v1/models", key=self.api_key, timeout=QUICK)
        with self._understood("/v1/models"):
            return [(str(model["id"]), model.get("parent")) for model in answer["data"]]

    def _call(
        self, method: str, path: str, body: Any = None, *, key: str = "", timeout: Any = TIMEOUT_S
    ) -> Any:
        with self._reached():
            response = _client().request(
                method, self.url + path, json=body, headers=_headers(key), timeout=timeout
            )
        answer = _json(response)
        if response.is_success:
            return answer
        raise self._refusal(path, response.status_code, answer)

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        with (
            self._reached(),
            _client().stream(
                "POST",
                self.url + COMPLETIONS,
                json=body | {"stream": True},
                headers=_headers(self.api_key),
                timeout=QUICK,
            ) as response,
        ):
            if not response.is_success:
                response.read()
                raise self._refusal(COMPLETIONS, response.status_code, _json(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                with self._understood(COMPLETIONS):
                    event = json.loads(data)
                    if "error" in event:  # after the first pieces
                        raise self._refusal(COMPLETIONS, response.status_code, event)
                    pieces = [one["delta"].get("content") for one in event["choices"]]
                yield from (piece for piece in pieces if piece)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            line = f"{self.url}: the model server does not answer ({reason})"
            raise NoAnswerError(line) from None

    @contextmanager
    def _understood(self, path: str) -> Iterator[None]:
        """Raises WorkError for an answer without what every model server answers."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            raise NoAnswerError(
                f"{self.url}{path}: the answer is none of a model server; check OPENPALM_SERVER_URL"
            ) from None

    def _refusal(self, path: str, status: int, answer: Any) -> WorkError:
        error = answer.get("error") if isinstance(answer, dict) else None
        error = error if isinstance(error, dict) else {}
        kind = ContextError if error.get("code") == "context_length_exceeded" else WorkError
        reason = str(error.get("message") or "no reason")[:1000]
        return kind(f"{self.url}{path}: status {status}: {reason}")


def _unlimited(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name != "max_tokens"}


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _json(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return {}


@cache
def _client() -> httpx2.Client:
    """One for all threads. No connection is kept: the server may be another one next time."""
    return httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0))


def site_server() -> ModelServer | None:
    """The server of OPENPALM_SERVER_URL; None if the site has none."""
    if not settings.SERVER_URL:
        return None
    return ModelServer(settings.SERVER_URL, settings.SERVER_API_KEY, settings.SERVER_ADMIN_KEY)


def promoted_path() -> str | None:
    """The checkpoint that the server has by promotion, of whichever project; None without one."""
    try:
        found = json.loads((Path(settings.FEEDBACK_DIR) / SERVED_FILE).read_text(encoding="utf-8"))[
            "path"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
