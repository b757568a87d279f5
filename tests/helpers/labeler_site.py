"""A site with a project for each test of the labelers' pages, and its database for their checks."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from feedback_site import Site

LONG = "The palm grows slowly at first, because it builds the whole width of its trunk. " * 60
CODE = "Like this:\n\n```python\ndef square(x):\n    return x * x\n```\n\nIt is fast."
RTL = "النخلة شجرة معروفة.\n\nשלום and English."
XSS = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
PASSWORD = "correct horse battery"

# Runs in `openpalm feedback manage shell`; prints the session of each user.
SEED = """
import json, sys
from importlib import import_module
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
from openpalm.feedback.models import Guideline, Membership, ModelVersion, Project, User

given = json.loads({given!r})
users = {{name: User.objects.create_user(name) for name in given["users"]}}
User.objects.create_superuser("root", password=None)
users["ann"].set_password(given["password"])
users["ann"].save()
for wanted in given["projects"]:
    items = wanted.pop("items")
    project = Project.objects.create(name=wanted["slug"], **wanted)
    Guideline.objects.create(project=project, version=1, text="# Rules\\n\\nBe *kind*.")
    models = [
        ModelVersion.objects.create(project=project, name=name, checkpoint=f"{{name}}-hash")
        for name in ("secret-0", "secret-1", "secret-2", "secret-3")
    ]
    for user in users.values():
        Membership.objects.create(project=project, user=user, role="annotator")
    add_items(project, [
        NewItem(messages, tuple(
            NewCandidate(text, models[n % 4].checkpoint, {{"secret": 1}}, models[n % 4])
            for n, text in enumerate(texts)
        ), "typed")
        for messages, texts in items
    ])
sessions = {{}}
for name, user in users.items():
    session = import_module(settings.SESSION_ENGINE).SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.save()
    sessions[name] = session.session_key
print(json.dumps(sessions))
"""


def item(text: str, *answers: str) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    return [{"role": "user", "content": text}], answers


def items(count: int, *answers: str) -> list[Any]:
    return [item(f"question {number}", *answers) for number in range(1, count + 1)]


@dataclass
class LabelerSite:
    site: Site
    sessions: dict[str, str]

    def url(self, project: str, page: str = "label") -> str:
        return f"{self.site.url}/p/{project}/{page}"

    def profile(self, user: str) -> dict[str, Any]:
        """Options of a browser profile in which the user is signed in."""
        return {"storage_state": {"cookies": [self.cookie(user)], "origins": []}}

    def cookie(self, user: str) -> dict[str, Any]:
        named = {"name": "openpalm_session", "value": self.sessions[user]}
        about = {"expires": -1, "httpOnly": True, "secure": False, "sameSite": "Lax"}
        return named | about | {"domain": "127.0.0.1", "path": "/"}

    def responses(self, project: str) -> list[tuple[str, Any, bool, int | None]]:
        """(state, payload, in force, elapsed_ms) of each response, in their order."""
        rows = self.query(
            "SELECT r.state, r.payload, r.in_force, r.elapsed_ms FROM feedback_response r "
            "JOIN feedback_project p ON p.id = r.project_id "
            f"WHERE p.slug = '{project}' ORDER BY r.id"
        )
        return [(state, _json(payload), bool(kept), ms) for state, payload, kept, ms in rows]

    def query(self, statement: str) -> list[Any]:
        """The rows of a statement, from the site's database."""
        if url := self.site.environment.get("DATABASE_URL"):
            import psycopg

            with psycopg.connect(url) as connection:
                return connection.execute(statement.encode()).fetchall()
        connection = sqlite3.connect(self.site.folder / "db.sqlite3")
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def seed(site: Site, users: list[str], projects: list[dict[str, Any]]) -> LabelerSite:
    """Fills the site. A project is its fields and `items`."""
    given = json.dumps({"users": users, "projects": projects, "password": PASSWORD})
    said = site.manage("shell", "-c", SEED.format(given=given))
    return LabelerSite(site, json.loads(said.splitlines()[-1]))


class SlowModels(ThreadingHTTPServer):
    """Streams the beginning of an answer, and its end once `go` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SlowAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.go = threading.Event()


class _SlowAnswer(BaseHTTPRequestHandler):
    server: SlowModels

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "secret-0"}, {"id": "secret-1"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream("I am ")
            threading.Event().wait(0.6)  # the site stores what it has every half second
            self._stream("writing")
            self.server.go.wait(30)
            self._stream(" and now at the end.")
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass  # the site has stopped to read

    def _stream(self, piece: str) -> None:
        event = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


@contextmanager
def slow_models() -> Iterator[SlowModels]:
    server = SlowModels()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.go.set()
        server.shutdown()
        thread.join()
        server.server_close()
