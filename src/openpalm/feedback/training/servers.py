"""Model servers over HTTP: the site's own server, or one started for a job and ended after it."""

import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
from django.conf import settings

from openpalm.base.files import write_atomically
from openpalm.errors import DataError, WorkError
from openpalm.feedback.database import storable
from openpalm.feedback.models import ModelVersion
from openpalm.feedback.worker.processes import POLL_S, Command, end
from openpalm.feedback.worker.progress import Progress

REQUEST_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 600.0
SERVED_FILE = "served.json"
"""what the server has by promotion, for the process that starts it again after a crash"""
_READY = re.compile(r"chat page at (http://\S+?)/,")


class NoAnswerError(WorkError):
    """The server did not answer: whether it did what was asked is unknown."""


class ContextError(WorkError):
    """Prompt and `max_tokens` do not fit the model's context."""


@dataclass(frozen=True)
class ModelServer:
    """A server of the OpenAI API, as the command line of `openpalm serve` makes one."""

    url: str
    api_key: str = ""
    admin_key: str = ""

    def complete(self, body: dict[str, Any]) -> list[str]:
        """The texts of a chat completion. Raises WorkError with the server's own reason.

        `max_tokens` is a limit: where the context leaves fewer tokens, the answer ends with it.
        """
        path, key = "/v1/chat/completions", self.api_key
        try:
            answer = self._call("POST", path, body, key=key)
        except ContextError:
            without = {name: value for name, value in body.items() if name != "max_tokens"}
            answer = self._call("POST", path, without, key=key)
        with self._understood(path):
            contents = [choice["message"]["content"] or "" for choice in answer["choices"]]
            return [storable(contents[0]), *map(storable, contents[1:])]

    def model_name(self) -> str:
        """The name of the base model in the API."""
        path = "/v1/models"
        answer = self._call("GET", path, key=self.api_key)
        with self._understood(path):
            return next(str(model["id"]) for model in answer["data"] if not model.get("parent"))

    def replace_model(self, path: str, name: str) -> dict[str, Any]:
        """Serves another checkpoint; returns when new requests go to it."""
        body = {"path": path, "name": name}
        path = "/admin/models"
        answer = self._call("POST", path, body, key=self.admin_key)
        with self._understood(path):
            return {"replaced": answer["replaced"]}

    @contextmanager
    def _understood(self, path: str) -> Iterator[None]:
        """Raises WorkError for an answer without what every model server answers."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, StopIteration):
            raise NoAnswerError(
                f"{self.url}{path}: the answer is none of a model server; check OPENPALM_SERVER_URL"
            ) from None

    def _call(self, method: str, path: str, body: Any = None, *, key: str = "") -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = _client().request(method, self.url + path, json=body, headers=headers)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            line = f"{self.url}: the model server does not answer ({reason})"
            raise NoAnswerError(line) from None
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = {}
        if response.is_success:
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None
        error = error if isinstance(error, dict) else {}
        kind = ContextError if error.get("code") == "context_length_exceeded" else WorkError
        reason = str(error.get("message") or "no reason")[:1000]
        raise kind(f"{self.url}{path}: status {response.status_code}: {reason}")


@cache
def _client() -> httpx2.Client:
    """One for all threads. No connection is kept: the server may be another one next time."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.Client(timeout=REQUEST_TIMEOUT_S, limits=limits)


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


def write_served(model: ModelVersion) -> None:
    """Names the model for the process that starts the server next. Raises OSError."""
    content = {"path": model.path, "project": model.project.slug, "model": model.name}
    write_atomically(Path(settings.FEEDBACK_DIR) / SERVED_FILE, json.dumps(content))


def forget_promotion() -> None:
    (Path(settings.FEEDBACK_DIR) / SERVED_FILE).unlink(missing_ok=True)


def _has(model: ModelVersion) -> bool:
    """Whether the site's server has this model: another project may have promoted one since."""
    return model.pk == model.project.served_id and promoted_path() in (None, model.path)


@contextmanager
def serving(model: ModelVersion, progress: Progress) -> Iterator[ModelServer]:
    """A server of this model: the site's, if that is the model it serves, or a temporary one."""
    server = site_server()
    if server is not None and _has(model):
        yield server
        return
    if not model.path:
        raise DataError(f"the model {model} is known by its answers only; it has no checkpoint")
    with temporary_server(model.path, progress) as server:
        yield server


@contextmanager
def temporary_server(path: str, progress: Progress) -> Iterator[ModelServer]:
    """`openpalm serve PATH` on a free port of this machine, ended at the end of the block."""
    folder = Path(settings.FEEDBACK_DIR) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="serve-", suffix=".log") as log:
        key = secrets.token_urlsafe(24)
        # Through the environment: other users of the machine can read command lines.
        keys = {"OPENPALM_API_KEY": key, "OPENPALM_ADMIN_KEY": secrets.token_urlsafe(24)}
        words = ["serve", path, "--port", "0", "--shutdown-timeout", "1"]
        command = Command(words, Path(log.name), keys, dies_with_us=True)
        process = command.start()
        try:
            progress.say(f"loading {path}")
            waited = 0.0
            while not (
                ready := _READY.search(Path(log.name).read_text(encoding="utf-8", errors="replace"))
            ):
                if process.poll() is not None or waited > LOAD_TIMEOUT_S:
                    reason = command.last_line() or f"no answer in {LOAD_TIMEOUT_S:.0f} s"
                    raise WorkError(f"{path} cannot be served: {reason}")
                progress.wait(POLL_S)
                waited += POLL_S
            yield ModelServer(ready[1], key)
        finally:
            end(process, wait_s=10)
