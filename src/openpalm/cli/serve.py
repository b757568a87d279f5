"""`openpalm serve`: a model behind the OpenAI API, with a chat page."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import Literal

from openpalm.errors import SettingsError
from openpalm.settings import parse


@dataclass(frozen=True)
class ServeSettings:
    """What to serve, to whom, how much at once."""

    path: str
    """run, checkpoint or hub name"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 is every one of this machine, and needs --api-key"""
    port: int = 8000
    """0 takes a free one"""
    api_key: list[str] | str | None = None
    """bearer token of callers, several as a JSON list; or OPENPALM_API_KEY, unseen by ps"""
    admin_key: str | None = None
    """for replacing the model and for scores; or OPENPALM_ADMIN_KEY. Without it nobody may"""
    name: str | None = None
    """the model's name in the API; not set is the run's"""
    slots: int = 32
    """sequences generated at once"""
    queue: int = 256
    """sequences that may wait for a slot; more are answered 429"""
    drain: int = 60
    """seconds that requests in flight have to finish after SIGTERM or Ctrl-C"""
    allow_origin: list[str] | str | None = None
    """web sites whose pages may call this server (CORS); several as a JSON list"""
    sink: str | None = None
    """URL that gets conversations whose user agreed (the request's `store`), as JSON"""
    tokenizer: Path | None = None
    """tokenizer.json for a checkpoint that has none"""
    force: bool = False
    """read with another tokenizer than the model's own"""
    adapter: Path | None = None
    """low-rank adapter for the model: PEFT's layout, or a run or checkpoint that has one"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of weights and arithmetic; auto is bfloat16 where the machine has instructions for it"""
    quantize: Literal["int8", "int4"] | None = None
    """keep the matrices in fewer bits: faster, a little worse, on a CPU; computes in bfloat16"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingsError(f"--port {self.port}: must be 0 (any free one) to 65535")
        for name, least in (("slots", 1), ("queue", 0), ("drain", 0)):
            value = getattr(self, name)
            if value < least:
                raise SettingsError(f"--{name} {value}: must be {least} or more")
        if "" in (*self.keys, *self.admin_keys):
            raise SettingsError("a key is empty; give one that cannot be guessed")
        if not self.keys and not _is_local(self.host):
            raise SettingsError(
                f"--host {self.host}: others could use the model; give --api-key (or "
                "OPENPALM_API_KEY), or listen at 127.0.0.1"
            )

    @property
    def keys(self) -> list[str]:
        return _listed(self.api_key, "OPENPALM_API_KEY")

    @property
    def admin_keys(self) -> list[str]:
        return _listed(self.admin_key, "OPENPALM_ADMIN_KEY")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ServeSettings,
        argv,
        verb="serve",
        about="Serves a model over HTTP: the OpenAI API at /v1, a page to chat at /.",
        examples=[
            "openpalm serve runs/quickstart/sft",
            "OPENPALM_API_KEY=... openpalm serve runs/chat --host 0.0.0.0 --port 80",
            "openpalm serve runs/chat --name assistant --slots 64 --quantize int8",
        ],
        positional=["path"],
    )
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise SettingsError(
            f"{error.name} is missing; `pip install 'openpalm[serve]'` brings what serving needs"
        ) from None
    del fastapi, prometheus_client, uvicorn
    from openpalm.serve import server

    listener = server.bind(settings.host, settings.port)
    with listener:
        _serve(settings, listener)


def _serve(settings: ServeSettings, listener: socket) -> None:
    from rich.console import Console

    from openpalm.cli.common import serving_engine
    from openpalm.serve import server
    from openpalm.serve.app import create_app
    from openpalm.serve.metrics import Metrics
    from openpalm.serve.service import Service
    from openpalm.serve.sink import Sink
    from openpalm.serve.worker import Served, Worker, in_own_thread

    def load(path: str, name: str | None) -> Served:
        own = settings if path == settings.path else replace(settings, adapter=None)
        engine, tokenizer = serving_engine(path, own, slots=settings.slots)
        return Served(name or _name(path), engine, tokenizer, path)

    sink = Sink(settings.sink) if settings.sink else None
    metrics = Metrics()
    with Console(stderr=True).status(f"loading {settings.path}"):
        served = in_own_thread(lambda: load(settings.path, settings.name))
    worker = Worker(served, queue_limit=settings.queue, observe=metrics.observe)
    metrics.watch(worker)
    app = create_app(
        Service(worker, load, metrics, sink),
        keys=settings.keys,
        admin_keys=settings.admin_keys,
        allow_origins=_listed(settings.allow_origin),
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def ready() -> None:
        print(
            f"{served.name}: a page to chat at http://{shown}:{port}/, the OpenAI API at "
            f"http://{shown}:{port}/v1; Ctrl-C ends",
            flush=True,
        )

    server.run(app, listener, worker, drain_s=settings.drain, ready=ready)


def _name(path: str) -> str:
    """The last part of a path that is no step or best directory: runs/tiny/step-10 is tiny."""
    parts = [part for part in Path(path).resolve().parts if not part.startswith("step-")]
    return parts[-1] if parts else path


def _listed(given: list[str] | str | None, variable: str | None = None) -> list[str]:
    if given is None and variable:
        given = os.environ.get(variable)
    return given if isinstance(given, list) else [given] if given is not None else []


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
