"""The door: keys, hosts, the size of bodies, and JSON that is really JSON.

A body is read whole, within bounds, before anything looks at it.
"""

import hmac
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.serve.problems import ApiError, error_response

MAX_BODY_BYTES = 8 << 20
OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json", "/favicon.ico"})
"""Paths that need no key, beside /static/."""
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
        try:
            self._admit(scope)
            body = await _whole_body(receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            return
        else:
            await self._app(scope, _replayed(body, receive), send)

    def _admit(self, scope: Scope) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower())
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


async def _whole_body(receive: Receive) -> bytes:
    """Raises ApiError for a body too large, ClientDisconnect where it does not come whole."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        more = message.get("more_body", False)
        # What is too much is still read, and thrown away: most callers send everything before
        # they look at the answer. Not for ever.
        if size > MAX_BODY_BYTES and (not more or size > 16 * MAX_BODY_BYTES):
            raise ApiError(
                413, f"the body is too large; at most {MAX_BODY_BYTES >> 20} MiB are read"
            )
        if not more:
            return b"".join(chunks)


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
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


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
