"""Conversations are delivered or dropped, and drops are counted."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from openpalm.errors import SettingsError
from openpalm.serve.conversation_sink import ATTEMPTS, ConversationSink


@contextmanager
def receiver(statuses, tokens=None):
    """An HTTP server that answers with these statuses, the last one again and again."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            if tokens is not None:
                tokens.append(self.headers["Authorization"])
            self.send_response(statuses[min(len(received), len(statuses)) - 1])
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", received
        server.shutdown()


def post(url, conversations):
    sink = ConversationSink(url)
    for conversation in conversations:
        sink.put(conversation)
    sink.close(timeout_s=60)
    return sink


def test_conversations_arrive_in_order():
    conversations = [{"answer": "é\u2028"}, {"answer": "b"}]
    with receiver([204]) as (url, received):
        sink = post(url, conversations)
    assert [json.loads(body) for body in received] == conversations
    assert (sink.sent, sink.dropped) == (2, 0)


def test_a_failed_delivery_is_repeated(capfd):
    with receiver([500, 200]) as (url, received):
        sink = post(url, [{}])
    assert (len(received), sink.sent, sink.dropped) == (2, 1, 0)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("status", [302, 400, 503])
def test_undeliverable_conversations_are_dropped_and_reported_once(capfd, status):
    """A redirect would turn the POST into a GET without the conversation."""
    with receiver([status]) as (url, received):
        sink = post(url, [{}, {}])
    assert (len(received), sink.sent, sink.dropped) == (2 * ATTEMPTS, 0, 2)
    assert capfd.readouterr().err.count("takes no conversations") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://", "http://[x/"])
def test_an_unreachable_url_drops(capfd, url):
    assert post(url, [{}]).dropped == 1
    assert url in capfd.readouterr().err


@pytest.mark.parametrize("token", ["opf_secret", None])
def test_the_token_of_the_environment_is_sent(monkeypatch, token):
    headers = []
    monkeypatch.delenv("OPENPALM_CONVERSATION_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("OPENPALM_CONVERSATION_TOKEN", f"{token}\n")
    with receiver([204], headers) as (url, _):
        post(url, [{}])
    assert headers == [f"Bearer {token}" if token else None]


def test_a_token_that_fits_no_header_is_refused(monkeypatch):
    monkeypatch.setenv("OPENPALM_CONVERSATION_TOKEN", "a\nb")
    with pytest.raises(SettingsError, match="OPENPALM_CONVERSATION_TOKEN"):
        ConversationSink("http://127.0.0.1:1/")
