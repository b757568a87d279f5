"""One connection's bounds, enforced on its bytes before a request exists.

The parser behind uvicorn keeps whatever a caller sends as one header, joined again with each
packet, on the event loop that everybody shares. Here the bytes are counted first.
"""

import json
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from openpalm.serve.api.error_responses import error_body

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together."""
MAX_HEADERS = 100
OVERHEAD = 8
"""Bytes of framing for each byte of a body; a chunk of one byte needs five."""
MAX_UNREAD_BYTES = 128 << 20
"""Of a body that comes after its answer; more closes the connection."""
HEAD_TIMEOUT_S = 20.0
"""From the connection, or from an answer, to the end of the next request's headers."""
_SLICE = 16 << 10
_TOO_LARGE = f"the headers are too large; at most {MAX_HEAD_BYTES >> 10} KiB are read"
_TOO_MANY = f"too many headers; at most {MAX_HEADERS} are read"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds for heads, framing, what follows an answer, and idleness."""

    transport: Transport
    _deadline: TimerHandle | None = None
    _framing = 0  # bytes of this message that are no body
    _body = 0
    _unread = 0
    _too_many = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data) and not self.transport.is_closing():
            # Trailers and the framing of chunks count like a head: the parser keeps them too.
            # Not one byte beyond the bound is parsed; large parts are parsed in small ones.
            left = MAX_HEAD_BYTES + OVERHEAD * self._body - self._framing
            if left <= 0:
                self._refuse(431, _TOO_LARGE)
                return
            part = data[start : start + min(left, _SLICE)]
            start += len(part)
            self._framing += len(part)
            super().data_received(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_many = True
            raise ValueError  # ends the parsing; what follows is send_400_response

    def on_headers_complete(self) -> None:
        self._cancel_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body)
        self._body += len(body)
        if self.cycle.response_complete:
            self._unread += len(body)
            if self._unread > MAX_UNREAD_BYTES:
                self.transport.close()
                return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._framing = self._body = self._unread = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the shape of all the others."""
        if self._too_many:
            self._refuse(431, _TOO_MANY)
        else:
            self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        # In the middle of another answer there is no place for this one.
        if self.cycle is None or self.cycle.response_complete:
            content = json.dumps(error_body(status, message)).encode()
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n"
            self.transport.write(STATUS_LINE[status] + head % len(content) + b"\r\n" + content)
        self.transport.close()

    def _expect_head(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
