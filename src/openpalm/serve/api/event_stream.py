"""Server-sent events (SSE), and work that is cancelled when its client disconnects."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
# json.dumps with `separators` would make a new encoder for each chunk.
_encode = json.JSONEncoder(separators=(",", ":")).encode


class Disconnected(Exception):
    """The client closed the connection before the response was complete."""


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data).encode() + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. If the client disconnects first, cancels it: Disconnected.

    The framework watches for this only while it streams, so it is watched here for all responses.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def response_unless_disconnected(
    request: Request, work: Coroutine[Any, Any, Response], close: Callable[[], None]
) -> Response:
    """The response that `work` makes, or an empty one after a disconnect. Calls `close` last."""
    try:
        return await unless_disconnected(request.receive, work)
    except Disconnected:
        return Response(status_code=499)
    finally:
        close()


class EventStream(Response):
    """Streams server-sent events. `close` is called at the end, also after a disconnect."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__()
        self._events = events
        self._close = close
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # asks nginx not to buffer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._write(send))
        except Disconnected:
            pass
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
