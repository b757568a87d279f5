"""Checkpoints changed by hand with a manifest that agrees, and the application without a socket."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from openpalm.checkpoint.directory import load
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine
from openpalm.serve.app import create_app
from openpalm.serve.metrics import Metrics
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel, Worker

Body = dict[str, Any]


def seal(directory: Path, change: Callable[[Body], object] = lambda body: None) -> Path:
    """Writes the manifest again for the files as they are now; `change` gets it before its hash."""
    file = directory / "manifest.json"
    body = json.loads(file.read_text(encoding="utf-8"))
    del body["sha256"]
    for name in body["files"]:
        content = (directory / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        body["files"][name] = {"bytes": len(content), "sha256": digest}
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body | {"sha256": digest}, indent=1) + "\n", encoding="utf-8")
    return directory


def altered(base: Path, to: Path, name: str, change: Callable[[Body], object]) -> Path:
    """A copy of the checkpoint with a JSON file in it changed."""
    shutil.copytree(base, to)
    content = json.loads((to / name).read_text(encoding="utf-8"))
    change(content)
    (to / name).write_text(json.dumps(content), encoding="utf-8")
    return seal(to)


def answers(
    directory: Path,
    calls: Sequence[tuple[str, str, Body | None]],
    *,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> list[httpx2.Response]:
    """What the application with this model answers to (method, path, body), one after the other.

    Weights that are not finite are served, as `openpalm serve` does; `options` are create_app's.
    """
    model = load(directory, allow=lambda reason: None)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    served = ServedModel("base", Engine(model, slots=4), tokenizer, str(directory))
    worker = Worker(served, max_queue=16)
    app = create_app(
        Service(worker, lambda path, name: served, lambda base, path, name: base, Metrics()),
        **options,
    )

    async def ask() -> list[httpx2.Response]:
        worker.start()
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as client:
            found = [await client.request(method, path, json=body) for method, path, body in calls]
        worker.stop()
        return found

    return asyncio.run(ask())
