"""A Chromium, the page in it, and servers to talk to: the real one and a scripted one.

Every page is watched: errors in its console, violations of the content security policy and requests
that leave the server's origin fail the test that opened it.
"""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import chromium
import pytest
from requirements import BROWSER, leave_out
from servers import serving

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "src" / "openpalm" / "serve" / "page"
# What the real server sends; test_page.py compares the two.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


# --- the browser -------------------------------------------------------------------------------


def pytest_runtest_setup(item):
    reason = chromium.missing()
    if reason and item.path.is_relative_to(HERE):
        leave_out(reason, BROWSER)


@pytest.fixture
def visit(browser):
    """Opens a server's page in a fresh profile: `visit(url, **options of the profile)`."""
    pages = chromium.Pages(browser)

    def open_page(url, **options):
        page = pages.open(url, **options)
        page.locator("#model-name:not(:empty), #notice:not([hidden])").first.wait_for()
        return page

    yield open_page
    assert pages.close() == []


# --- the servers -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def page_server(run):
    """The URL of `openpalm serve` with a tiny model."""
    with serving(run) as server:
        yield server.url


@pytest.fixture
def scripted():
    with scripted_server() as server:
        yield server


@pytest.fixture
def chat(visit, scripted):
    """The page, talking to `scripted`."""
    return visit(scripted.url)


@pytest.fixture
def stream():
    """How to write what a server streams: `stream.token`, `stream.chunk`."""
    return SimpleNamespace(token=token, chunk=chunk)


def token(text: str | bytes, chance: float = 0.5, others: dict[str, float] | None = None) -> dict:
    """An entry of `logprobs.content`; `others` are the alternatives and their probabilities."""

    def entry(text: str | bytes, chance: float) -> dict:
        data = text.encode() if isinstance(text, str) else text
        try:
            name = data.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return {"token": name, "logprob": math.log(chance), "bytes": list(data)}

    top = [entry(text, chance), *(entry(other, p) for other, p in (others or {}).items())]
    top.sort(key=lambda entry: -entry["logprob"])
    return entry(text, chance) | {"top_logprobs": top[:5]}


def chunk(text: str, *tokens: dict, finish: str | None = None) -> dict:
    """What the API streams for some new text and the tokens that wrote it."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    choice["logprobs"] = {"content": list(tokens)}
    return {"object": "chat.completion.chunk", "choices": [choice], "usage": None}


class Scripted(ThreadingHTTPServer):
    """Serves the page and answers as it was told; a real socket, so streams can be slow.

    `say` and `refuse` queue answers; with none left it echoes. `received` holds what the page sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.key: str | None = None
        self.sharing = True
        self.received: list[dict] = []
        self.script: list = []
        self.disconnected = threading.Event()

    def say(self, *chunks: str | dict, delay_s: float = 0.0, hang: bool = False, end: bool = True):
        """Streams the chunks; then finishes, or breaks off (`end`), or just waits (`hang`)."""
        self.script.append(("say", chunks, delay_s, hang, end))

    def refuse(self, status: int, message: str, **headers: str):
        self.script.append(("refuse", status, message, headers))


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/v1/models":
            if self._allowed():
                about = {"sampling": {"temperature": 0.6, "top_p": 1.0, "top_k": 0}}
                about |= {"takes_conversations": self.server.sharing}
                models = [{"id": name} | about for name in ("tiny", "other")]
                self._json(200, {"object": "list", "data": models})
            return
        name = self.path.removeprefix("/static/") if self.path != "/" else "index.html"
        path = PAGE / name
        if "/" in name or not path.is_file():
            self._json(404, {"error": {"message": "no such page"}})
            return
        self._head(
            200, TYPES.get(path.suffix, "image/svg+xml"), {"Content-Security-Policy": POLICY}
        )
        self.wfile.write(path.read_bytes())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.received.append(body)
        echo = ("say", (f"You said: {body['messages'][-1]['content']}",), 0.0, False, True)
        kind, *rest = self.server.script.pop(0) if self.server.script else echo
        if kind == "refuse":
            status, message, headers = rest
            self._json(status, {"error": {"message": message, "type": "x", "code": None}}, headers)
        else:
            self._head(200, "text/event-stream", {})
            try:
                self._stream(*rest)
            except OSError:
                self.server.disconnected.set()

    def _stream(self, chunks, delay_s, hang, end):
        pause = threading.Event()
        count = 0
        for item in chunks:
            item = chunk(item, *(token(word) for word in [item])) if isinstance(item, str) else item
            count += len(item.get("choices", [{}])[0].get("logprobs", {}).get("content", []))
            self._event(json.dumps(item))
            pause.wait(delay_s)
        while hang:
            pause.wait(0.05)
            self._event("")  # fails once the page has gone
        if end:
            self._event(json.dumps(chunk("", finish="stop")))
            self._event(json.dumps({"choices": [], "usage": {"completion_tokens": count}}))
            self._event("[DONE]")

    def _event(self, data: str):
        self.wfile.write((f"data: {data}\n\n" if data else ": waiting\n\n").encode())

    def _allowed(self) -> bool:
        allowed = self.server.key in (None, self.headers.get("Authorization", "")[len("Bearer ") :])
        if not allowed:
            self._json(401, {"error": {"message": "invalid API key", "code": "invalid_api_key"}})
        return allowed

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None):
        self._head(status, "application/json", headers or {})
        self.wfile.write(json.dumps(value).encode())

    def _head(self, status: int, kind: str, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


@contextmanager
def scripted_server():
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
