"""A response that is written while it is made, and work that ends when its caller has gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """Nobody waits for the answer any more."""


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def while_wanted(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; where the caller disconnects first, the work is cancelled: Gone."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def answer_or_nothing(
    request: Request, work: Coroutine[Any, Any, Response], close: Callable[[], None]
) -> Response:
    """The response that `work` makes; an empty one to a caller who has gone. Then `close`."""
    try:
        return await while_wanted(request.receive, work)
    except Gone:
        return Response(status_code=499)
    finally:
        close()


class EventStream(Response):
    """Server-sent events; `close` is called at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__()
        self._events = events
        self._close = close
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_wanted(receive, self._write(send))
        except Gone:
            pass
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
