"""Hostile requests get the right status and a helpful message, and the server survives."""

import json
import socket

import pytest
from servers import HANGS_S

from openpalm.serve.access.body import MAX_BODY_BYTES

COMPLETIONS = "/v1/completions"
DEEP = b'{"prompt": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (
            b'{"prompt": "' + b"a" * 10_000_000 + b'"}',
            413,
            "the limit for this path is 8 MiB",
        ),
        (b" " * (20 * MAX_BODY_BYTES // 10) + b"{}", 413, "too large"),
        (DEEP, 400, "nested too deeply"),
        (b"[" * 1_000_000, 400, "nested too deeply"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "NaN is not a JSON number"),
        (b'{"prompt": "a", "temperature": -Infinity}', 400, "Infinity is not a JSON number"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "too many digits"),
        (b'{"prompt": "\\ud800"}', 400, "surrogate"),
        (b'{"prompt": "a", "stop": "\\udfff"}', 400, "surrogate"),
        (b'{"prompt": "a", "model": "\\uD800"}', 400, "surrogate"),
        (b'{"prompt": "a", "user": "\\ud800"}', 400, "surrogate"),
        (b'{"\\ud800": 1}', 400, "surrogate"),
        (b'{"prompt": "\xed\xa0\x80"}', 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not JSON"),
        (b"", 400, "body: Field required"),
        (b"{", 400, "not JSON"),
        (b"null", 400, "body"),
        (b'"prompt"', 400, "body"),
        (b"[]", 400, "body"),
        (b"{}", 400, "prompt"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bodies(call, raw, status, says):
    answer = call(COMPLETIONS, raw=raw)
    assert answer.status == status
    error = answer.body["error"]
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (
            "prompt",
            "a" * 200,
            "200 tokens and 16 tokens to generate do not fit the model's",
        ),
        ("prompt", "é" * 100_000, "do not fit"),
        ("prompt", [1] * 300_000, "do not fit"),
        ("prompt", [], "prompt: must be a string"),
        ("prompt", [[]], "prompt: must be"),
        ("prompt", None, "prompt: must be"),
        ("prompt", 5, "prompt: must be"),
        ("prompt", {"a": 1}, "prompt: must be"),
        ("prompt", ["a", 1], "prompt: must be"),
        ("prompt", [1, "a"], "prompt: must be"),
        ("prompt", [-1], "prompt: must be"),
        ("prompt", [True], "prompt: must be"),
        ("prompt", [1.5], "prompt: must be"),
        ("prompt", [265], "token id 265: the model's vocabulary has 265"),
        ("prompt", ["a"] * 1025, "prompt: must be"),
        ("prompt", ["a"] * 1000, "1000 sequences in one request; this server takes 264"),
        ("n", 1000, "n: should be less than or equal to 128; it is 1000"),
        ("n", 0, "n: should be greater than or equal to 1"),
        ("n", "2", "n: should be a valid integer"),
        ("n", 1.0, "n: should be a valid integer"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", 128, "do not fit the model's context of 128"),
        ("max_tokens", 10**30, "max_tokens"),
        ("temperature", 2.1, "temperature: should be less than or equal to 2; it is 2.1"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "hot", "temperature: should be a valid number"),
        ("top_p", 0, "top_p: should be greater than 0; it is 0"),
        ("top_p", 1.1, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.5, "min_p"),
        ("seed", 2**63, "seed"),
        ("presence_penalty", 3, "presence_penalty"),
        ("logprobs", 21, "logprobs"),
        ("stop", ["a"] * 17, "stop: must be a string or a list of at most 16 strings"),
        ("logit_bias", {"265": 1}, "logit_bias: '265' is not a token id of this model (0 to 264)"),
        ("logit_bias", {"a\u0000": 1}, "is not a token id"),
        ("logit_bias", {"١": 1}, "is not a token id"),
        ("logit_bias", {"1": 101}, "logit_bias.1: should be less than or equal to 100"),
        ("logit_bias", [1], "logit_bias"),
        ("max_completion_tokens", 0, "only with echo"),
        ("suffix", "end", "suffix: not supported"),
        ("best_of", 2, "best_of: not supported above n"),
        ("stream", "yes", "stream: should be a valid boolean"),
        ("stream_options", {"include_usage": True}, "only with stream"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_fields(call, field, value, says):
    answer = call(COMPLETIONS, {"prompt": "a", field: value})
    assert answer.status == 400
    assert says in answer.body["error"]["message"]


def test_unknown_fields_and_nul_bytes_are_accepted(call):
    body = {"prompt": "a\u0000b", "max_tokens": 2, "suffix": "", "best_of": 1, "x": {"y": [None]}}
    assert call(COMPLETIONS, body).status == 200


def test_an_unknown_model(call):
    for path, body in (
        (COMPLETIONS, {"prompt": "a", "model": "gpt-9"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}], "model": "x"}),
        ("/v1/models/gpt-9", None),
    ):
        answer = call(path, body)
        assert (answer.status, answer.body["error"]["code"]) == (404, "model_not_found")
        assert "this server has 'base'" in answer.body["error"]["message"]


def test_wrong_paths_and_methods(call):
    for path, status in (("/v1/nothing", 404), (COMPLETIONS, 405), ("/static/../app.py", 404)):
        answer = call(path)
        assert answer.status == status
        assert answer.body["error"]["type"].endswith("error")
        assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        (b"Content-Type: text/plain\r\n", b"Content-Type is 'text/plain'; send"),
        (b"", b"Content-Type is missing; send"),
        (
            b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n",
            b"Content-Encoding 'gzip': send the body uncompressed",
        ),
    ],
)
def test_undeclared_json_is_refused(server, headers, says):
    """A page of another site cannot send JSON without a CORS preflight, so it starts nothing."""
    reply = raw_request(
        server,
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        + headers
        + b"Content-Length: 15\r\n"
        b"Connection: close\r\n\r\n" + b'{"prompt": "a"}',
    )
    assert reply.startswith(b"HTTP/1.1 415")
    assert says in reply


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/x+json"])
def test_other_content_types_of_json_are_accepted(server, kind):
    reply = raw_request(
        server,
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        "Content-Length: 15\r\nConnection: close\r\n\r\n".encode()
        + b'{"prompt": "a"}',
    )
    assert reply.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"evil.example:8000", b"401"),
        (b"127.0.0.1.evil.example", b"401"),
        (b"", b"401"),
        (b"localhost", b"200"),
        (b"LOCALHOST:80", b"200"),
        (b"[::1]", b"200"),
        (b"[::1]:8000", b"200"),
    ],
)
def test_only_local_host_names_are_accepted(server, host, status):
    """DNS rebinding: evil.example points its name at 127.0.0.1."""
    head = b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    reply = raw_request(server, head)
    assert reply.startswith(b"HTTP/1.1 " + status)
    assert b"access-control-allow-origin" not in reply.lower()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_invalid_http(server, sent):
    port = int(server.url.rsplit(":")[-1])
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_S) as connection:
        connection.sendall(sent)
    assert server.call("/health").status == 200
    server.wait_idle()


def test_the_body_limit_holds_for_chunks(server):
    port = int(server.url.rsplit(":")[-1])
    chunk = b"%x\r\n" % (1 << 20) + b" " * (1 << 20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_S) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(10):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def raw_request(server, content):
    port = int(server.url.rsplit(":")[-1])
    with socket.create_connection(("127.0.0.1", port), timeout=HANGS_S) as connection:
        connection.sendall(content)
        reply = b""
        while part := connection.recv(1 << 16):
            reply += part
    json.loads(reply.split(b"\r\n\r\n", 1)[1])
    return reply
