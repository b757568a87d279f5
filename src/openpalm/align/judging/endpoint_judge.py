"""A judge behind an OpenAI-compatible endpoint, asked over HTTP.

What comes back is not trusted: it is bounded in size and time, redirects are refused (they would
take the key elsewhere), and what cannot be read is a clear error. What may pass is tried again, as
late as the endpoint asks; an option that it refuses is left out from then on; a question that it
refuses is passed over.
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

from openpalm.align.judging.model_judge import LEAST_MASS, Judged, Question, Refused
from openpalm.align.judging.parse_verdict import verdict
from openpalm.base.console import shown
from openpalm.errors import SettingsError, WorkError

T = TypeVar("T")
MAX_REPLY_BYTES = 1 << 20
TRIES = 5
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may not meet."""
OF_THE_ITEM = frozenset({400, 413, 422})
"""Statuses that may be about one question, or about an option of the request."""
MAX_WAIT_S = 600.0
"""The longest Retry-After that is waited for."""
TOP, FEWER = 20, 5
"""Likeliest tokens that are asked for; some endpoints give fewer."""
SHORT, LONG = 16, 1024
"""Tokens of a verdict, and of one that begins with thoughts."""


class _Reply(NamedTuple):
    status: int
    headers: Any
    content: bytes


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
        wait: Callable[[float], Awaitable[object]] = asyncio.sleep,
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
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout_s, self._parallel, self._wait = timeout_s, parallel, wait
        self._without: frozenset[str] = frozenset()
        """options that this endpoint has refused"""
        self._verdict_tokens = SHORT

    def fits(self, text: str, reply_tokens: int) -> bool:
        return True  # the endpoint knows, and says so

    def first(self, questions: Sequence[Question]) -> list[Judged]:
        return self._all([lambda client, q=q: self._decide(client, q) for q in questions])

    def write(self, texts: Sequence[str], max_new_tokens: int) -> list[str | Refused]:
        async def written(client: Any, text: str) -> str | Refused:
            choice = await self._ask(client, text, max_new_tokens)
            return choice if isinstance(choice, Refused) else _content(choice)

        return self._all([lambda client, text=text: written(client, text) for text in texts])

    def _all(self, jobs: Sequence[Callable[[Any], Awaitable[T]]]) -> list[T]:
        """What the jobs return, in their order; at most `parallel` at a time."""
        import httpx2  # only who asks an endpoint needs it

        async def together() -> list[T]:
            places = asyncio.Semaphore(self._parallel)

            async def one(job: Callable[[Any], Awaitable[T]]) -> T:
                async with places:
                    return await job(client)

            async with httpx2.AsyncClient(headers=self._headers, timeout=None) as client:
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(one(job)) for job in jobs]
                except* WorkError as errors:
                    raise errors.exceptions[0] from None
            return [task.result() for task in tasks]

        return asyncio.run(together())

    async def _decide(self, client: Any, question: Question) -> Judged:
        """The first label's probability; None where the reply decides for neither."""
        tokens = self._verdict_tokens
        choice = await self._ask(client, question.text, tokens, weighed=True)
        if isinstance(choice, Refused):
            return choice
        weighed = _weighed(choice, question.labels)
        if weighed is not None:
            return weighed
        found = verdict(_content(choice), question.labels)
        if found is None and tokens < LONG and choice.get("finish_reason") == "length":
            choice = await self._ask(client, question.text, LONG)
            if isinstance(choice, Refused):  # no room for more: the short reply stays undecided
                return None
            found = verdict(_content(choice), question.labels)
            if found is not None:
                self._verdict_tokens = LONG
        return None if found is None else float(found == 0)

    async def _ask(
        self, client: Any, text: str, max_tokens: int, *, weighed: bool = False
    ) -> dict[str, Any] | Refused:
        """The first choice of a reply; each option that is refused is left out, once for all."""
        without = self._without
        while True:
            body = self._body(text, max_tokens, weighed, without)
            reply = await self._post(client, json.dumps(body).encode())
            if reply.status == 200:
                self._without |= without
                return self._choice(reply)
            problem = _told(reply)
            if reply.status not in OF_THE_ITEM:
                raise self._failed(problem)
            fewer = without | _refused_options(problem, body)
            if fewer == without:
                return Refused(problem)
            without = fewer

    def _body(
        self, text: str, max_tokens: int, weighed: bool, without: frozenset[str]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if "max_tokens" in without:
            body["max_completion_tokens"] = body.pop("max_tokens")
        if weighed:
            most = FEWER if "more than 5 top_logprobs" in without else TOP
            body |= {"logprobs": True, "top_logprobs": most}
        return {name: value for name, value in body.items() if name not in without}

    async def _post(self, client: Any, body: bytes) -> _Reply:
        """The reply to one request, tried again after twice as long each time."""
        import httpx2

        problem = ""
        for attempt in range(TRIES):
            pause = 2**attempt * (0.5 + random.random() / 2)
            try:
                async with asyncio.timeout(self._timeout_s):  # all of it: connecting to last byte
                    reply = await self._read(client, body)
            except TimeoutError:
                problem = f"timed out after {self._timeout_s:g} s (--timeout)"
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                problem = shown(str(error) or type(error).__name__)
            else:
                if reply.status not in PASSING:
                    return reply
                problem = _told(reply)
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
                        f"--endpoint {self._url}: its reply is larger than {MAX_REPLY_BYTES}"
                    )
        return _Reply(response.status_code, response.headers, bytes(content))

    def _choice(self, reply: _Reply) -> dict[str, Any]:
        value = _json(reply.content)
        if not isinstance(value, dict):
            raise WorkError(f"--endpoint {self._url}: its reply is no JSON object; check the URL")
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict):
            raise WorkError(f"--endpoint {self._url}: its reply has no choices; is it OpenAI's?")
        return first

    def _failed(self, problem: str) -> WorkError:
        return WorkError(
            f"--endpoint {self._url}: {problem}; finished judgements are saved: fix this and run "
            "the command again"
        )


def _refused_options(problem: str, body: dict[str, Any]) -> set[str]:
    """What to leave out of the next try, by the options that the reason names."""
    if re.search(r"\btop_logprobs\b", problem) and body.get("top_logprobs") == TOP:
        return {"more than 5 top_logprobs"}
    if re.search(r"logprobs\b", problem, re.IGNORECASE) and "logprobs" in body:
        return {"logprobs", "top_logprobs"}
    for name in ("temperature", "max_tokens", "max_completion_tokens"):
        if name in body and re.search(rf"\b{name}\b", problem):
            return {name}
    return set()


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks to wait, given as seconds or a date; 0 without a usable one."""
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


def _weighed(choice: dict[str, Any], labels: tuple[str, str]) -> float | None:
    """The first label's share of both in the first token; None where both have too little: then
    the reply's words count."""
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
    return masses[0] / sum(masses) if sum(masses) >= LEAST_MASS else None


def _means(token: str, label: str) -> bool:
    return token.strip().casefold() == label.casefold()


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _told(reply: _Reply) -> str:
    """The status, and the reason in whichever of the usual shapes the server gives it."""
    reason = _reason(_json(reply.content))
    return f"status {reply.status}" + (f" ({shown(reason[:1000])})" if reason else "")


def _reason(said: Any) -> str | None:
    """Of {"error": {"message"}}, {"error": text}, {"message"} or FastAPI's {"detail"}."""
    if isinstance(said, str):
        return said
    if isinstance(said, list):
        return _reason(said[0]) if said else None
    if not isinstance(said, dict):
        return None
    found = (_reason(said.get(name)) for name in ("error", "message", "detail", "msg"))
    return next((reason for reason in found if reason), None)
