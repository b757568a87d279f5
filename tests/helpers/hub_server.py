"""A local stand-in of the Hugging Face Hub: repositories in memory, made, written and read by
huggingface_hub's ordinary calls."""

import base64
import hashlib
import importlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0" * 40
TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """`repositories` by type and name: {"models/me/tiny": Repository, ...}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refused = False
        """answers every write with 403"""
        self.objects: dict[str, bytes] = {}
        """large files by their SHA-256, uploaded apart from the commits (Git LFS)"""
        self.cut_after: int | None = None
        """cuts the connection of every large file after so many"""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.requests.append(f"POST {path}")
        if self.server.refused or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 403 if self.server.refused else 401
            self._json({"error": "You may not write here."}, status)
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            if found[2] == "preupload":
                self._upload_modes(json.loads(content)["files"])
            else:
                self._commit(found[1], content)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._large_files(json.loads(content)["objects"])
        elif found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/paths-info/\w+", path):
            wanted = json.loads(content)["paths"]
            self._json([e for e in self._entries(found[1]) if e["path"] in wanted])
        else:
            self._missing()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"PUT {self.path}")
        if self.server.cut_after is not None and len(self.server.objects) >= self.server.cut_after:
            self.connection.close()
            return
        name = self.path.removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == name
        self.server.objects[name] = content
        self._json({})

    def _upload_modes(self, files: list[dict[str, Any]]) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".parquet", ".bin")) else "regular"

        modes = [
            {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False}
            for file in files
        ]
        self._json({"files": modes})

    def _large_files(self, wanted: list[dict[str, Any]]) -> None:
        """Where to send each large file; no address for those that are here."""
        answers = []
        for one in wanted:
            upload = {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}
            is_known = one["oid"] in self.server.objects
            answers.append(one | ({} if is_known else {"actions": upload}))
        self._json({"transfer": "basic", "objects": answers})

    def _entries(self, key: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": n, "size": len(c), "oid": COMMIT}
            for n, c in self.server.repositories[key].files.items()
        ]

    def _create(self, given: dict[str, Any]) -> None:
        kind = f"{given.get('type') or 'model'}s"
        name = f"{given['organization']}/{given['name']}" if given.get("organization") else None
        key = f"{kind}/{name or given['name']}"
        url = {"url": f"{self.server.address}/{key.removeprefix('models/')}"}
        if key in self.server.repositories:
            return self._json(url | {"error": "You already created this repo"}, 409)
        # Newer versions of huggingface_hub send the visibility.
        private = bool(given.get("private")) or given.get("visibility") == "private"
        self.server.repositories[key] = Repository(private)
        return self._json(url)

    def _commit(self, key: str, content: bytes) -> None:
        repository = self.server.repositories[key]
        for line in content.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                repository.files.pop(value["path"], None)
        url = f"{self.server.address}/{key.removeprefix('models/')}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        pattern = r"/api/(\w+/[\w.-]+/[\w.-]+)(/revision/\w+|/tree/\w+)?(/.*)?"
        if found := re.fullmatch(pattern, path):
            repository = self.server.repositories.get(found[1])
            if repository is None:
                return self._missing("RepoNotFound")
            if found[3]:
                return self._missing()  # no repository here has folders
            if (found[2] or "").startswith("/tree"):
                return self._json(self._entries(found[1]))
            name = found[1].partition("/")[2]
            siblings = [{"rfilename": file} for file in repository.files]
            facts = {"id": name, "modelId": name, "sha": COMMIT, "private": repository.private}
            return self._json(facts | {"siblings": siblings, "tags": []})
        found = re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path)
        key = "" if found is None else found[1]
        key = key if key.startswith("datasets/") else f"models/{key}"
        repository = self.server.repositories.get(key)
        if found is None or repository is None:
            return self._missing("RepoNotFound")
        if found[2] not in repository.files:
            return self._missing("EntryNotFound")
        return self._file(repository.files[found[2]], body)

    def _file(self, content: bytes, body: bool) -> None:
        whole, asked = content, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            content = whole[int(asked[1]) : int(asked[2] or len(whole)) + 1]
        self.send_response(206 if asked else 200)
        if asked:
            last = int(asked[1]) + len(content) - 1
            self.send_header("Content-Range", f"bytes {asked[1]}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _missing(self, code: str = "EntryNotFound") -> None:
        self._json({"error": "not found"}, 404, {"X-Error-Code": code})

    def _json(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A server that huggingface_hub in this process uses as the Hub; `cache` gets downloads."""
    constants = importlib.import_module("huggingface_hub.constants")
    with HubServer() as made:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + template)
        monkeypatch.setattr(constants, "ENDPOINT", made.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()
