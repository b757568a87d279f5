"""The door: keys, hosts, the size of bodies, and JSON that is really JSON.

A body is read whole, within bounds, before anything looks at it.
"""

import asyncio
import hmac
import json
import re
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.serve.api.error_responses import ApiError, as_api_error, error_response, is_failure

MAX_BODY_BYTES = 8 << 20
"""For what takes prompts, texts or tokens; SMALL_BODY_BYTES for everything else."""
SMALL_BODY_BYTES = 64 << 10
LARGE = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/score",
        "/tokenize",
        "/detokenize",
        "/complete",
    }
)
MAX_DISCARDED_BYTES = 16 * MAX_BODY_BYTES
BODY_TIMEOUT_S = 60.0
REFUSED_TIMEOUT_S = 10.0
"""For the body of a request that is refused whatever is in it."""
OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json", "/favicon.ico"})
"""Paths that need no key, beside /static/."""
LIFE = "/health"
"""Answered under any name: what watches a server calls it by an address, or by none."""
ADMIN = ("/admin/", "/v1/score")
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Door:
    """ASGI middleware that lets in who may enter.

    Without `keys` every caller is answered, but only under a local name: a page that another
    site's name leads to (DNS rebinding) is not. Without `admin_keys` nobody is an administrator.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], admin_keys: Sequence[str]):
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # what GET answers; the server leaves out the body
            scope = {**scope, "method": "GET"}
        try:
            body = await self._admitted_body(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await _guarded(self._app, scope, _replayed(body, receive), send)

    async def _admitted_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError for a caller or a body that is not let in."""
        path, headers = scope["path"], dict(scope["headers"])
        limit = MAX_BODY_BYTES if path in LARGE else SMALL_BODY_BYTES
        try:
            self._admit(scope)
            check_declared(headers, limit)
        except ApiError:
            # Most callers send everything before they look at the answer. Nothing is kept of it.
            if b"expect" not in headers:
                with suppress(ApiError):
                    await _whole_body(receive, 0, REFUSED_TIMEOUT_S)
            raise
        return await _whole_body(receive, limit, BODY_TIMEOUT_S)

    def _admit(self, scope: Scope) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if path == LIFE:
            return
        if not self._keys and host not in LOCAL_HOSTS:
            raise ApiError(401, f"host {host[:100]}: without an API key only localhost is answered")
        if path in OPEN or path.startswith("/static/") or scope["method"] == "OPTIONS":
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        key = given[7:].strip() if given[:7].lower() == "bearer " else ""
        if _is_one_of(key, self._admin_keys):
            return
        if path.startswith(ADMIN):
            raise ApiError(401, _ADMIN_HELP if self._admin_keys else _NO_ADMIN, code="admin_key")
        if self._keys and not _is_one_of(key, self._keys):
            what = "wrong" if key else "missing"
            help_ = "send it as `Authorization: Bearer KEY`"
            raise ApiError(401, f"the API key is {what}; {help_}", code="invalid_api_key")


_ADMIN_HELP = "this needs the admin key; send it as `Authorization: Bearer KEY`"
_NO_ADMIN = "this needs an admin key; start the server with --admin-key"


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Compared in a time that does not tell how much of a key is right."""
    return any(hmac.compare_digest(key.encode(), known.encode()) for known in keys)


def check_declared(headers: dict[bytes, bytes], limit: int) -> None:
    """Raises ApiError for a body that says itself that it is too large."""
    if int(headers.get(b"content-length", b"0")) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
    return ApiError(413, f"the body is too large; at most {size} are read here")


async def _whole_body(receive: Receive, limit: int, timeout_s: float) -> bytes:
    """Raises ApiError for a body too large or too slow, ClientDisconnect where it breaks off."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} seconds") from None


async def _read(receive: Receive, limit: int) -> bytes:
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        more = message.get("more_body", False)
        # What is too much is still read, and thrown away. Not for ever.
        if size > limit and (not more or size > MAX_DISCARDED_BYTES):
            raise _too_large(limit)
        if not more:
            return b"".join(chunks)


async def _guarded(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs `app`; what nobody else caught is answered too, where nothing was answered yet."""
    started = False

    async def watching(message: Message) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await send(message)

    try:
        await app(scope, receive, watching)
    except BaseException as error:  # a panic in a library is no Exception
        if started or not is_failure(error):
            raise
        traceback.print_exc()
        await error_response(as_api_error(error))(scope, receive, send)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever else comes."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


class StrictRoute(APIRoute):
    """A route whose bodies are JSON by the letter: no NaN, no endless nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                _check_form(request.headers)
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def _check_form(headers: Headers) -> None:
    """Raises ApiError for a body that is not declared as plain JSON.

    A page of another site can send no such declaration without being asked for leave first.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r}: send the body uncompressed")
    given = headers.get("content-type", "")
    kind = given.split(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[^/]+\+json", kind):
        what = f"is {given[:100]!r}" if given.strip() else "is missing"
        raise ApiError(415, f"Content-Type {what}; send `Content-Type: application/json`")


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            text = (await self.body()).decode()
            content = json.loads(text, parse_constant=_refuse)
            if "\\ud" in text.lower():  # an escape that could be half of a character
                json.dumps(content, ensure_ascii=False).encode()
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except UnicodeEncodeError:
            raise HTTPException(400, "the body has half a surrogate pair in it") from None
        except ValueError as error:
            if "integer string conversion" in str(error):
                raise HTTPException(400, "a number in the body has too many digits") from None
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        return content


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
