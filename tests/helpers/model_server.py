"""A stand-in for `openpalm serve`: answers what a test says, and loads models."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    url: str = ""
    admin_key: str = "admin"
    name: str = "assistant"
    path: str = "first"
    answer: Callable[[dict[str, Any]], str] = lambda body: f"answer {body['seed']}"
    requests: list[dict[str, Any]] = field(default_factory=list)
    refuses: str | dict[str, str] = ""
    """reason why models, or those of these paths, cannot be loaded"""
    hangs_up: bool = False
    """once: the model is loaded, and there is no answer"""
    drops: int = 0
    """number of requests that are not answered: the connection is closed"""
    garbage: bytes | None = None
    """content of every answer, whatever was asked"""
    status: int = 200
    """of the garbage"""
    context: int = 0
    """tokens of an answer that fit; 0 is no limit"""


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    state = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def reply(self, status: int, body: object) -> None:
            content = json.dumps(body).encode()
            if state.garbage is not None:
                status, content = state.status, state.garbage
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # a caller that was killed
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": state.name, "parent": None}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/admin/models":
                refuses = state.refuses
                if isinstance(refuses, dict):
                    refuses = refuses.get(body["path"])
                if self.headers["Authorization"] != f"Bearer {state.admin_key}":
                    self.reply(401, {"error": {"message": "the admin key is wrong"}})
                elif refuses:
                    self.reply(400, {"error": {"message": refuses}})
                else:
                    replaced, state.path, state.name = state.name, body["path"], body["name"]
                    if state.hangs_up:
                        state.hangs_up = False
                        self.close_connection = True
                        return
                    self.reply(200, {"model": state.name, "replaced": replaced})
                return
            if state.drops:
                state.drops -= 1
                self.close_connection = True
                return
            state.requests.append(body)
            text = state.answer(body)
            if state.context and body.get("max_tokens", 1) > state.context:
                error = {"message": "it does not fit", "code": "context_length_exceeded"}
                self.reply(400, {"error": error})
                return
            if text == "refuse":
                self.reply(400, {"error": {"message": "the prompt is too long"}})
                return
            if text == "no room" and "max_tokens" in body:
                code = "context_length_exceeded"
                self.reply(400, {"error": {"message": "they do not fit", "code": code}})
                return
            self.reply(200, {"choices": [{"message": {"content": text}}]})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
