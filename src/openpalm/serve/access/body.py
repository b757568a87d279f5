"""Request bodies: limits of size and time, and strict JSON.

The whole body is read, within the limits, before a route handles the request.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.serve.api.error_responses import ApiError, error_response

MAX_BODY_BYTES = 8 << 20
"""Limit for the paths in LARGE_BODY_PATHS."""
SMALL_BODY_BYTES = 64 << 10
"""Limit for all other paths."""
LARGE_BODY_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/score",
        "/tokenize",
        "/detokenize",
        "/complete",
    }
)
"""Paths that take prompts, texts or token ids."""
MAX_DISCARDED_BYTES = 16 * MAX_BODY_BYTES
"""Of a body over the limit, this much is read and thrown away before the answer."""
BODY_TIMEOUT_S = 60.0
REFUSED_TIMEOUT_S = 10.0
"""For the body of a request that is refused in any case."""


class BodyMiddleware:
    """ASGI middleware that reads the whole body and passes it on as one message."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = MAX_BODY_BYTES if scope["path"] in LARGE_BODY_PATHS else SMALL_BODY_BYTES
        try:
            if _declared_bytes(scope) > limit:
                await discard_body(scope, receive)
                raise _too_large(limit)
            body = await _read_body(receive, limit, BODY_TIMEOUT_S)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await self._app(scope, _replay(body, receive), send)


async def discard_body(scope: Scope, receive: Receive) -> None:
    """Reads the body of a request that is refused, and keeps nothing of it.

    Most clients send the whole body before they read the answer. A client that sent
    `Expect: 100-continue` waits for the answer first. Raises ClientDisconnect.
    """
    if b"expect" not in dict(scope["headers"]):
        with suppress(ApiError):
            await _read_body(receive, 0, REFUSED_TIMEOUT_S)


def _declared_bytes(scope: Scope) -> int:
    return int(dict(scope["headers"]).get(b"content-length", b"0"))


def _too_large(limit: int) -> ApiError:
    size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
    return ApiError(413, f"the body is too large; the limit for this path is {size}")


async def _read_body(receive: Receive, limit: int, timeout_s: float) -> bytes:
    """Raises ApiError for a body too large or too slow, ClientDisconnect for an incomplete one."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_chunks(receive, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} seconds") from None


async def _read_chunks(receive: Receive, limit: int) -> bytes:
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
        # The rest of a body over the limit is read so that the client can read the answer; an
        # endless body is cut off.
        if size > limit and (not more or size > MAX_DISCARDED_BYTES):
            raise _too_large(limit)
        if not more:
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns the body as one message; later calls pass through (a disconnect)."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


class StrictRoute(APIRoute):
    """A route that accepts only strict JSON: no NaN, no infinity, limited nesting."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                _check_content_type(request.headers)
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def _check_content_type(headers: Headers) -> None:
    """Raises ApiError for a body that is not declared as uncompressed JSON.

    A web page of another site cannot send this header without a CORS preflight request, so it
    cannot start a generation here.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"Content-Encoding {encoding[:40]!r}: send the body uncompressed")
    declared = headers.get("content-type", "")
    kind = declared.split(";")[0].strip().lower()
    if kind != "application/json" and not re.fullmatch(r"application/[^/]+\+json", kind):
        found = f"is {declared[:100]!r}" if declared.strip() else "is missing"
        raise ApiError(415, f"Content-Type {found}; send `Content-Type: application/json`")


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            text = (await self.body()).decode()
            content = json.loads(text, parse_constant=_refuse_constant)
            # An escape may be half of a surrogate pair, which no UTF-8 response could repeat.
            if "\\ud" in text.lower():
                json.dumps(content, ensure_ascii=False).encode()
        except RecursionError:
            raise HTTPException(400, "the body is nested too deeply") from None
        except UnicodeEncodeError:
            raise HTTPException(400, "the body contains half a surrogate pair") from None
        except ValueError as error:
            if "integer string conversion" in str(error):
                raise HTTPException(400, "a number in the body has too many digits") from None
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
