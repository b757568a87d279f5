"""A stand-in for an OpenAI-compatible server, in this process, that replies as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def says(content: str, top: dict[str, float] | None = None) -> Reply:
    """A chat completion, with log-probabilities of its first token where given."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": content}}
    if top is not None:
        listed = [{"token": token, "logprob": value} for token, value in top.items()]
        choice["logprobs"] = {"content": [{"top_logprobs": listed}]}
    return Reply(json.dumps({"choices": [choice]}).encode())


def fails(status: int, message: str = "no", **headers: str) -> Reply:
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, headers)


@contextmanager
def judging(reply: Callable[[str, int], Reply]) -> Iterator[Seen]:
    """`reply` gets what was asked, and how many requests there were before."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body | {"path": self.path})
                seen.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = reply(body["messages"][-1]["content"], number)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            with suppress(OSError):  # whoever asked has left
                self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen = Seen(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()
