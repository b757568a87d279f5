"""A stand-in for the Hugging Face Hub: repositories in memory, uploads by LFS, reading by HTTP."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class HubServer(ThreadingHTTPServer):
    """`repos`: {"datasets/me/x": {path: content}}; `sent`: the sizes of the LFS objects sent.

    `fail_after`: the number of LFS objects after which a connection is cut.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.sent: list[int] = []
        self.commits: list[str] = []
        self.fail_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_POST(self) -> None:
        path, body = self._request()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(datasets/.+?/.+?)/preupload/main", path):
            self._modes(found[1], json.loads(body))
        elif found := re.fullmatch(r"/(datasets/.+?/.+?)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/api/(datasets/.+?/.+?)/commit/main", path):
            self._commit(found[1], body)
        elif found := re.fullmatch(r"/api/(datasets/.+?/.+?)/paths-info/.+", path):
            wanted = json.loads(body)["paths"]
            self._json([e for e in self._entries(found[1]) if e["path"] in wanted])
        else:
            self._json({"error": f"no such address {path}"}, 404)

    def do_PUT(self) -> None:
        path, body = self._request()
        if self.server.fail_after is not None and len(self.server.sent) >= self.server.fail_after:
            self.close_connection = True
            self.connection.close()
            return
        name = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == name
        self.server.objects[name] = body
        self.server.sent.append(len(body))
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _ = self._request()
        if found := re.fullmatch(r"/(datasets/[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found[1], found[2])
        elif found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            # The tree of a folder that does not exist is an error on the Hub.
            self._listed(found[1], self._entries(found[1]) if not found[2] else None)
        elif found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)(/revision/[^/]+)?", path):
            name = found[1].removeprefix("datasets/")
            files = [{"rfilename": entry["path"]} for entry in self._entries(found[1])]
            about = {"_id": "0" * 24, "id": name, "sha": self._sha(found[1]), "siblings": files}
            self._listed(found[1], about | {"private": False, "tags": [], "gated": False})
        else:
            self._json({"error": "Not found"}, 404)

    def _request(self) -> tuple[str, bytes]:
        size = int(self.headers.get("Content-Length") or 0)
        return unquote(urlsplit(self.path).path), self.rfile.read(size)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"datasets/{wanted['organization']}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            self._json({"error": "You already created this dataset repo", "url": url}, 409)
            return
        self.server.repos[name] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(name)
        self._json({"url": url, "id": name.removeprefix("datasets/")})

    def _modes(self, repo: str, wanted: dict[str, Any]) -> None:
        kept = self.server.repos[repo]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".parquet", ".bin")) else "regular",
                "shouldIgnore": False,
                "oid": _oid(kept[file["path"]]) if file["path"] in kept else None,
            }
            for file in wanted["files"]
        ]
        self._json({"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for one in wanted["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
            known = one["oid"] in self.server.objects
            objects.append(one | ({} if known else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        kept = self.server.repos[repo]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                self.server.commits.append(value["summary"])
            elif operation["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                kept[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del kept[value["path"]]
        url = f"{self.server.url}/{repo}/commit/{self._sha(repo)}"
        self._json({"success": True, "commitOid": self._sha(repo), "commitUrl": url})

    def _entries(self, repo: str) -> list[dict[str, Any]]:
        kept = self.server.repos.get(repo, {})
        return [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
            for path, data in sorted(kept.items())
        ]

    def _listed(self, repo: str, answer: Any) -> None:
        if repo not in self.server.repos:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif answer is None:
            self._json({"error": "Not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._json(answer)

    def _file(self, repo: str, path: str) -> None:
        data = self.server.repos.get(repo, {}).get(path)
        if data is None:
            self._json({"error": "Not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self._sha(repo)}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(data, status, headers | {"Accept-Ranges": "bytes"})

    def _sha(self, repo: str) -> str:
        listing = json.dumps([e["oid"] + e["path"] for e in self._entries(repo)])
        return hashlib.sha1(listing.encode()).hexdigest()

    def _json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(answer).encode(), status, kind | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _oid(data: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
