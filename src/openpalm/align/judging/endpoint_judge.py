"""A judge behind an OpenAI-compatible endpoint: HTTP requests, API key, retries.

Replies are not trusted: their size and time are bounded, redirects are refused (they would send
the API key elsewhere), and an unreadable reply is a clear error. Temporary failures are retried
after the delay that the endpoint asks for. An option that the endpoint refuses is left out of all
later requests; a question that it refuses is skipped.
"""

import asyncio
import json
import math
import random
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from openpalm.align.judging.model_judge import MIN_LABEL_MASS, Question, Refused, Verdict
from openpalm.align.judging.parse_verdict import parse_verdict
from openpalm.base.console import shown
from openpalm.errors import SettingsError, WorkError

T = TypeVar("T")
MAX_REPLY_BYTES = 1 << 20
TRIES = 5
TEMPORARY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses to retry."""
REFUSALS = frozenset({400, 413, 422})
"""HTTP statuses that refuse one question or one option of the request."""
MAX_WAIT_S = 600.0
"""The longest Retry-After that is respected; a longer one is an error."""
TOP, FEWER = 20, 5
"""top_logprobs requested at first, and from endpoints that limit it to 5."""
SHORT, LONG = 16, 1024
"""max_tokens for a bare verdict, and for a model that reasons first."""


class _Reply(NamedTuple):
    status: int
    headers: Any
    content: bytes


class EndpointJudge:
    """`url` is the base that ends in /v1; `key`, if given, is sent as bearer token."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        parallel: int = 4,
        wait: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ):
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"--endpoint {url}: must be an http:// or https:// address")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise SettingsError(
                "OPENPALM_JUDGE_KEY: has characters that no HTTP header may have; check it"
            )
        self.name = model
        self._url = url.rstrip("/") + "/chat/completions"
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s, self._parallel, self._wait = timeout_s, parallel, wait
        self._without: frozenset[str] = frozenset()
        """options that this endpoint refused"""
        self._verdict_tokens = SHORT

    def fits(self, text: str, reply_tokens: int) -> bool:
        return True  # only the endpoint knows its context; it refuses a longer text

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        return self._all([lambda client, q=q: self._verdict(client, q) for q in questions])

    def write(self, texts: Sequence[str], max_new_tokens: int) -> list[str | Refused]:
        async def written(client: Any, text: str) -> str | Refused:
            choice = await self._ask(client, text, max_new_tokens)
            return choice if isinstance(choice, Refused) else _content(choice)

        return self._all([lambda client, text=text: written(client, text) for text in texts])

    def _all(self, jobs: Sequence[Callable[[Any], Awaitable[T]]]) -> list[T]:
        """Runs the requests, at most `parallel` at a time; results in the order of `jobs`."""
        import httpx2  # only needed with an endpoint

        async def together() -> list[T]:
            slots = asyncio.Semaphore(self._parallel)

            async def one(job: Callable[[Any], Awaitable[T]]) -> T:
                async with slots:
                    return await job(client)

            async with httpx2.AsyncClient(headers=self._headers, timeout=None) as client:
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(job)) for job in jobs]
                except ExceptionGroup as errors:
                    # Not `except*`: before Python 3.11.4 what is raised in it becomes a group.
                    failed, others = errors.split(WorkError)
                    if failed is None or others is not None:
                        raise
                    raise failed.exceptions[0] from None
            return [task.result() for task in tasks]

        return asyncio.run(together())

    async def _verdict(self, client: Any, question: Question) -> Verdict:
        """From the label's log-probabilities, if the endpoint gives them, otherwise from words."""
        tokens = self._verdict_tokens
        choice = await self._ask(client, question.text, tokens, logprobs=True)
        if isinstance(choice, Refused):
            return choice
        share = _first_label_share(choice, question.labels)
        if share is not None:
            return share
        found = parse_verdict(_content(choice), question.labels)
        if found is None and tokens < LONG and choice.get("finish_reason") == "length":
            # Cut off before the verdict: perhaps a model that reasons first. If more room helps,
            # all later questions get it at once.
            choice = await self._ask(client, question.text, LONG)
            if isinstance(choice, Refused):  # no room for a longer reply
                return None
            found = parse_verdict(_content(choice), question.labels)
            if found is not None:
                self._verdict_tokens = LONG
        return None if found is None else float(found == 0)

    async def _ask(
        self, client: Any, text: str, max_tokens: int, *, logprobs: bool = False
    ) -> dict[str, Any] | Refused:
        """The first choice of a reply; refused options are left out and the request repeated."""
        without = self._without
        while True:
            body = self._body(text, max_tokens, logprobs, without)
            reply = await self._post(client, json.dumps(body).encode())
            if reply.status == 200:
                self._without |= without
                return self._choice(reply)
            problem = _problem(reply)
            if reply.status not in REFUSALS:
                raise self._failed(problem)
            fewer = without | _refused_options(problem, body)
            if fewer == without:
                return Refused(problem)
            without = fewer

    def _body(
        self, text: str, max_tokens: int, logprobs: bool, without: frozenset[str]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if "max_tokens" in without:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if logprobs:
            most = FEWER if "more than 5 top_logprobs" in without else TOP
            body |= {"logprobs": True, "top_logprobs": most}
        return {name: value for name, value in body.items() if name not in without}

    async def _post(self, client: Any, body: bytes) -> _Reply:
        """The reply to one request, retried with exponential backoff and jitter."""
        import httpx2

        problem = ""
        for attempt in range(TRIES):
            pause = 2**attempt * (0.5 + random.random() / 2)
            try:
                async with asyncio.timeout(self._timeout_s):  # from connecting to the last byte
                    reply = await self._read(client, body)
            except TimeoutError:
                problem = f"timed out after {self._timeout_s:g} s (--timeout)"
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                problem = shown(str(error) or type(error).__name__)
            else:
                if reply.status not in TEMPORARY:
                    return reply
                problem = _problem(reply)
                asked = _retry_after(reply.headers.get("retry-after"))
                if asked > MAX_WAIT_S:
                    raise self._failed(f"{problem}; it asks to wait {asked:.0f} s")
                pause = max(pause, asked)
            if attempt < TRIES - 1:
                await self._wait(pause)
        raise self._failed(problem)

    async def _read(self, client: Any, body: bytes) -> _Reply:
        headers = {"Content-Type": "application/json"}
        content = bytearray()
        async with client.stream("POST", self._url, content=body, headers=headers) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_REPLY_BYTES:
                    raise WorkError(
                        f"--endpoint {self._url}: its reply is larger than {MAX_REPLY_BYTES} "
                        "bytes; check the URL"
                    )
        return _Reply(response.status_code, response.headers, bytes(content))

    def _choice(self, reply: _Reply) -> dict[str, Any]:
        value = _json(reply.content)
        if not isinstance(value, dict):
            raise WorkError(f"--endpoint {self._url}: its reply is no JSON object; check the URL")
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict):
            raise WorkError(
                f"--endpoint {self._url}: its reply has no choices; give the URL of an "
                "OpenAI-compatible API"
            )
        return first

    def _failed(self, problem: str) -> WorkError:
        return WorkError(
            f"--endpoint {self._url}: {problem}; finished judgements are saved: fix this and run "
            "the command again"
        )


def _refused_options(problem: str, body: dict[str, Any]) -> set[str]:
    """The options that the endpoint's error message names."""
    if re.search(r"\btop_logprobs\b", problem) and body.get("top_logprobs") == TOP:
        return {"more than 5 top_logprobs"}
    if re.search(r"logprobs\b", problem, re.IGNORECASE) and "logprobs" in body:
        return {"logprobs", "top_logprobs"}
    for name in ("temperature", "max_tokens", "max_completion_tokens"):
        if name in body and re.search(rf"\b{name}\b", problem):
            return {name}
    return set()


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from a header with seconds or a date; 0 without a valid header."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value)) if value.strip().isdecimal() else _seconds_to(value)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _seconds_to(date: str) -> float:
    until = parsedate_to_datetime(date)
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


def _content(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else ""


def _first_label_share(choice: dict[str, Any], labels: tuple[str, str]) -> float | None:
    """The first label's share of both labels' probability as first token.

    None where both together have too little: then the words of the reply count.
    """
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(str(item["token"]), float(item["logprob"])) for item in top]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    masses = [
        math.fsum(
            math.exp(min(0.0, p))
            for token, p in tokens
            if not math.isnan(p) and _is_label(token, label)
        )
        for label in labels
    ]
    return masses[0] / sum(masses) if sum(masses) >= MIN_LABEL_MASS else None


def _is_label(token: str, label: str) -> bool:
    return token.strip().casefold() == label.casefold()


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _problem(reply: _Reply) -> str:
    """The status, and the server's error message if it has one of the usual shapes."""
    reason = _reason(_json(reply.content))
    return f"status {reply.status}" + (f" ({shown(reason[:1000])})" if reason else "")


def _reason(value: Any) -> str | None:
    """The text of {"error": {"message"}}, {"error": text}, {"message"} or FastAPI's {"detail"}."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _reason(value[0]) if value else None
    if not isinstance(value, dict):
        return None
    found = (_reason(value.get(name)) for name in ("error", "message", "detail", "msg"))
    return next((reason for reason in found if reason), None)
