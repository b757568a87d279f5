"""Limits of a connection: headers, trailers, framing, bodies, idle time."""

import socket

import pytest
from servers import HANGS_S, serving

from openpalm.serve.access import body
from openpalm.serve.access.connections import MAX_HEAD_BYTES, MAX_HEADERS

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def exchange(server, *parts, most=60 << 20):
    """The response to these bytes, which are sent until the server closes the connection."""
    port = int(server.url.rsplit(":")[-1])
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_S) as connection:
        try:
            sent = 0
            for part in parts:
                connection.sendall(part)
                sent += len(part)
                assert sent < most, "the server reads on"
        except OSError:
            pass
        try:
            while part := connection.recv(1 << 16):
                reply += part
        except OSError:  # reset: it closed while more was coming in
            pass
    return reply


def test_an_endless_header_is_cut_off(server):
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
    # More than the limit plus the system's socket buffers.
    exchange(server, head, *[b"a" * (1 << 16)] * 1000)
    assert server.call("/health").status == 200


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /health HTTP/1.1\r\nX: ",
        b"GET /health HTTP/1.1\r\n" + b"a",
        CHUNKED + b"0\r\nX: ",
        CHUNKED + b"1;x=",
    ],
    ids=["path", "value", "name", "trailer", "extension"],
)
def test_endless_parts_of_a_request_are_refused_at_the_limit(server, start):
    rest = MAX_HEAD_BYTES + (1 << 14)
    reply = exchange(server, start + b"a" * rest)
    assert not reply or reply.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert server.call("/health").status == 200


@pytest.mark.parametrize(("count", "status"), [(MAX_HEADERS - 2, 200), (MAX_HEADERS, 431)])
def test_the_number_of_headers(server, count, status):
    lines = b"".join(b"X-%d: y\r\n" % i for i in range(count))
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    assert exchange(server, head + lines + b"\r\n").startswith(b"HTTP/1.1 %d" % status)


@pytest.mark.parametrize(("size", "status"), [(60 << 10, 200), (70 << 10, 431)])
def test_the_bytes_of_a_head(server, size, status):
    value = b"X: " + b"a" * size + b"\r\n"
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + value
    reply = exchange(server, head + b"\r\n")
    assert reply.startswith(b"HTTP/1.1 %d" % status)
    assert status == 200 or b'"type": "invalid_request_error"' in reply


def test_a_body_in_chunks_of_one_byte_is_read(server):
    body = b'{"prompt": "ab", "max_tokens": 1, "user": "' + b"u" * 30_000 + b'"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    close = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert exchange(server, close + chunks).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [
        ("/v1/completions", body.MAX_BODY_BYTES + 1, 413),
        ("/v1/models", body.SMALL_BODY_BYTES + 1, 413),
        ("/nothing", body.SMALL_BODY_BYTES + 1, 413),
        ("/nothing", body.SMALL_BODY_BYTES, 404),
        ("/admin/models", body.SMALL_BODY_BYTES + 1, 401),
    ],
)
def test_bodies_are_bounded_by_route_and_key(server, path, size, status):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
    reply = exchange(server, head.encode() + b"Connection: close\r\n\r\n", b" " * size)
    assert reply.startswith(b"HTTP/1.1 %d" % status)


def test_a_declared_length_over_the_limit_is_refused_before_the_body(server):
    head = POST + b"Content-Length: 99999999\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert exchange(server, head).startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def impatient(base):
    """A server with timeouts of 0.2 seconds."""
    code = (
        "import sys; from openpalm.serve.access import body, connections; "
        "connections.HEAD_TIMEOUT_S = body.BODY_TIMEOUT_S = 0.2; "
        "from openpalm.cli.main import main; sys.exit(main())"
    )
    with serving(base, "--dtype", "float32", program=["-c", code]) as running:
        yield running


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"\r\n", b""),
        (b"GET /health HT", b""),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b""),
        (POST + b"Content-Length: 10\r\n\r\n{", b"HTTP/1.1 408"),
    ],
    ids=["nothing", "a line's end", "half a line", "half a head", "half a body"],
)
def test_silent_connections_are_closed(impatient, sent, answer):
    reply = exchange(impatient, sent)
    assert reply[: len(answer) or 1] == answer


def test_health_needs_no_host_and_no_key(server):
    assert exchange(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    named = b"GET /health HTTP/1.1\r\nHost: web.example\r\nConnection: close\r\n\r\n"
    assert exchange(server, named).startswith(b"HTTP/1.1 200")
    assert exchange(server, b"GET /v1/models HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/v1/models"])
def test_head_is_get_without_the_body(server, path):
    head = b"HEAD " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reply = exchange(server, head)
    assert reply.startswith(b"HTTP/1.1 200")
    assert reply.endswith(b"\r\n\r\n")
    assert b"content-length: " in reply
