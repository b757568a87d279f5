"""A judge behind an OpenAI-compatible endpoint, asked over HTTP.

What comes back is not trusted: it is bounded in size and time, redirects are refused (they would
take the key elsewhere), and what cannot be read is a clear error. What may pass is tried again.
"""

import http.client
import json
import math
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from openpalm.align.judge import Question
from openpalm.data.corpus import shown
from openpalm.errors import SettingsError, WorkError

MAX_REPLY_BYTES = 1 << 20
TRIES = 5
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""
TOP = 20
"""Likeliest tokens that are asked for; more are refused."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        return None


class EndpointJudge:
    """`url` is the base that ends in /v1; `key` is sent as a bearer token where there is one."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        parallel: int = 4,
        wait: Callable[[float], object] = time.sleep,
    ):
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--endpoint {url}: must be an http:// or https:// address")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise SettingsError("OPENPALM_JUDGE_KEY: holds what no header may; check it")
        self.name = model
        self._url = url.rstrip("/") + "/chat/completions"
        self._key, self._timeout_s, self._parallel, self._wait = key, timeout_s, parallel, wait
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.undecided = 0
        """replies so far that were neither label"""

    def fits(self, text: str, reply_tokens: int) -> bool:
        return True  # the endpoint knows, and says so

    def first(self, questions: Sequence[Question]) -> list[float]:
        """A reply that is neither label leaves the question open, at one half, and is counted."""
        with ThreadPoolExecutor(self._parallel) as pool:
            found = list(pool.map(self._decide, questions))
        self.undecided += found.count(None)
        return [0.5 if chance is None else chance for chance in found]

    def write(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        with ThreadPoolExecutor(self._parallel) as pool:
            choices = pool.map(lambda text: self._ask(text, max_tokens=max_new_tokens), texts)
            return [_content(choice) for choice in choices]

    def _decide(self, question: Question) -> float | None:
        choice = self._ask(question.text, max_tokens=4, logprobs=True, top_logprobs=TOP)
        weighed = _weighed(choice, question.labels)
        if weighed is not None:
            return weighed
        said = _content(choice).strip().strip("().*\"'").casefold()
        found = [said.startswith(label.casefold()) for label in question.labels]
        return None if found[0] == found[1] else float(found[0])

    def _ask(self, text: str, **options: object) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            **options,
        }
        reply = self._post(json.dumps(body).encode())
        choices = reply.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict):
            raise WorkError(f"--endpoint {self._url}: its reply has no choices; is it OpenAI's?")
        return first

    def _post(self, body: bytes) -> dict[str, Any]:
        """The reply to one request, tried again after twice as long each time."""
        problem = ""
        for attempt in range(TRIES):
            try:
                return self._read(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem, passing = _told(error), error.code in PASSING
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem, passing = shown(str(reason) or type(reason).__name__), True
            if not passing:
                break
            if attempt < TRIES - 1:
                self._wait(2**attempt * (0.5 + random.random() / 2))
        raise WorkError(
            f"--endpoint {self._url}: {problem}; what was judged is kept: mend this and give the "
            "same command"
        )

    def _read(self, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)
        with self._opener.open(request, timeout=self._timeout_s) as response:
            content = response.read(MAX_REPLY_BYTES + 1)
        if len(content) > MAX_REPLY_BYTES:
            raise WorkError(f"--endpoint {self._url}: its reply is larger than {MAX_REPLY_BYTES}")
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise WorkError(f"--endpoint {self._url}: its reply is no JSON object; check the URL")
        return reply


def _content(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def _weighed(choice: dict[str, Any], labels: tuple[str, str]) -> float | None:
    """The first label's share of both, by the likeliest first tokens; None where none is one."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(str(item["token"]), float(item["logprob"])) for item in top]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    masses = [
        math.fsum(
            math.exp(min(0.0, p))
            for token, p in tokens
            if not math.isnan(p) and _means(token, label)
        )
        for label in labels
    ]
    return masses[0] / sum(masses) if sum(masses) > 0 else None


def _means(token: str, label: str) -> bool:
    return token.strip().casefold() == label.casefold()


def _told(error: urllib.error.HTTPError) -> str:
    """The status, and what an OpenAI-like server says of it."""
    try:
        said = json.loads(error.read(65536))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, http.client.HTTPException):
        said = None
    return f"status {error.code}" + (f" ({shown(said)})" if isinstance(said, str) else "")
