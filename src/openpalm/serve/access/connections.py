"""Limits of a connection: size of headers, number of headers, framing, idle time.

uvicorn's parser stores a header of any length and joins it again with each packet, on the event
loop that all connections share. Here the bytes are counted before they reach the parser.
"""

import json
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from openpalm.serve.api.error_responses import error_body

MAX_HEAD_BYTES = 64 << 10
"""Request line and headers together."""
MAX_HEADERS = 100
FRAMING_PER_BODY_BYTE = 8
"""Bytes of chunk framing allowed for each byte of a body; a chunk of one byte needs five."""
MAX_UNREAD_BYTES = 128 << 20
"""Limit for the rest of a body that arrives after its response; more closes the connection."""
HEAD_TIMEOUT_S = 20.0
"""From the connection, or the last response, to the end of the next request's headers."""
_SLICE = 16 << 10
_TOO_LARGE = f"the headers are too large; the limit is {MAX_HEAD_BYTES >> 10} KiB"
_TOO_MANY = f"too many headers; the limit is {MAX_HEADERS}"


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with these limits."""

    transport: Transport
    _deadline: TimerHandle | None = None
    _framing = 0  # bytes of this message outside its body
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
            # Trailers and chunk framing count as headers: the parser stores them too. No byte
            # beyond the limit is parsed. Slices are small so that on_body can credit body bytes.
            left = MAX_HEAD_BYTES + FRAMING_PER_BODY_BYTE * self._body - self._framing
            if left <= 0:
                self._refuse(431, _TOO_LARGE)
                return
            piece = data[start : start + min(left, _SLICE)]
            start += len(piece)
            self._framing += len(piece)  # on_body takes back the bytes of the body
            super().data_received(piece)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._too_many = True
            raise ValueError  # ends the parsing; uvicorn then calls send_400_response

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
        """Answers data that is not valid HTTP with an error in the API's shape."""
        if self._too_many:
            self._refuse(431, _TOO_MANY)
        else:
            self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        # No response can be written inside another one; the connection is only closed.
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
