"""`openpalm serve`: a model behind the OpenAI API, with a chat page."""

import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from typing import Literal
from urllib.parse import urlsplit

from openpalm.base.settings import parse, spell
from openpalm.errors import SettingsError


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
    max_sequences: int = 32
    """sequences generated at once"""
    max_queue: int = 256
    """sequences that may wait for a slot; more are answered 429"""
    shutdown_timeout: int = 60
    """seconds that requests in flight have to finish after SIGTERM or Ctrl-C"""
    allow_origin: list[str] | str | None = None
    """web sites whose pages may call this server (CORS); several as a JSON list"""
    conversation_url: str | None = None
    """URL that gets conversations whose user agreed (the request's `store`), as JSON"""
    tokenizer: Path | None = None
    """tokenizer.json for a checkpoint that has none"""
    adapter: Path | None = None
    """low-rank adapter for the model: PEFT's layout, or a run or checkpoint that has one"""
    force: bool = False
    """use a tokenizer or an adapter that does not belong to this checkpoint"""
    verify: bool = False
    """compare every file of the checkpoint with its manifest, the optimizer's state too"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of weights and arithmetic; auto is bfloat16 where the machine has instructions for it"""
    quantize: Literal["int8", "int4"] | None = None
    """keep the matrices in fewer bits: faster, a little worse, on a CPU; computes in bfloat16"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingsError(f"--port {self.port}: must be 0 (any free one) to 65535")
        for name, least in (("max_sequences", 1), ("max_queue", 0), ("shutdown_timeout", 0)):
            value = getattr(self, name)
            if value < least:
                raise SettingsError(f"{spell(name)} {value}: must be {least} or more")
        _check_keys("--api-key (or OPENPALM_API_KEY)", self.keys, given=self.api_key is not None)
        _check_keys("--admin-key (or OPENPALM_ADMIN_KEY)", self.admin_keys)
        _ = self.origins  # checked as they are read
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

    @property
    def origins(self) -> list[str]:
        """As browsers spell them. Raises SettingsError for what no browser sends."""
        return [_origin(text) for text in _listed(self.allow_origin)]


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ServeSettings,
        argv,
        verb="serve",
        about="Serves a model over HTTP: the OpenAI API at /v1, a page to chat at /.",
        examples=[
            "openpalm serve runs/quickstart/sft",
            "OPENPALM_API_KEY=... openpalm serve runs/chat --host 0.0.0.0 --port 80",
            "openpalm serve runs/chat --name assistant --max-sequences 64 --quantize int8",
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

    from openpalm.cli.common import serving_model
    from openpalm.serve import server
    from openpalm.serve.app import create_app
    from openpalm.serve.conversation_sink import ConversationSink
    from openpalm.serve.metrics import Metrics
    from openpalm.serve.service import Service
    from openpalm.serve.worker import ServedModel, Worker, in_own_thread

    def warn(reason: str) -> None:
        print(f"warning: {reason}; requests that meet them are answered 503", file=sys.stderr)

    def load(
        path: str, name: str | None, allow: Callable[[str], None] | None = None
    ) -> ServedModel:
        own = settings if path == settings.path else replace(settings, adapter=None)
        engine, tokenizer, defaults = serving_model(
            path, own, slots=settings.max_sequences, allow=allow
        )
        return ServedModel(name or _name(path), engine, tokenizer, path, defaults)

    sink = ConversationSink(settings.conversation_url) if settings.conversation_url else None
    metrics = Metrics()
    with Console(stderr=True).status(f"loading {settings.path}"):
        served = in_own_thread(lambda: load(settings.path, settings.name, warn))
    worker = Worker(served, queue_limit=settings.max_queue, observe=metrics.observe)
    metrics.watch(worker)
    app = create_app(
        Service(worker, load, metrics, sink),
        keys=settings.keys,
        admin_keys=settings.admin_keys,
        allow_origins=settings.origins,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def ready() -> None:
        print(
            f"{served.name}: a page to chat at http://{shown}:{port}/, the OpenAI API at "
            f"http://{shown}:{port}/v1; Ctrl-C ends",
            flush=True,
        )

    server.run(app, listener, worker, drain_s=settings.shutdown_timeout, ready=ready)


def _name(path: str) -> str:
    """The last part of a path that is no step or best directory: runs/tiny/step-10 is tiny."""
    parts = [part for part in Path(path).resolve().parts if not part.startswith("step-")]
    return parts[-1] if parts else path


def _listed(given: list[str] | str | None, variable: str | None = None) -> list[str]:
    """The values, without the white space around them; one that is a JSON list is several."""
    if given is None and variable:
        given = os.environ.get(variable)
    if isinstance(given, str) and given.strip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError:
            raise SettingsError(
                f"{variable or given}: begins like a JSON list and is none; "
                'give one value, or several as ["one", "two"]'
            ) from None
    values = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(value, str) for value in values):
        raise SettingsError(f'{variable or given}: give strings, as in ["one", "two"]')
    return [value.strip() for value in values]


def _check_keys(option: str, keys: Sequence[str], *, given: bool = False) -> None:
    """Raises SettingsError for a key that nobody can send, without showing it."""
    if given and not keys:
        raise SettingsError(f"{option}: has no key in it; leave it out, or give one")
    for number, key in enumerate(keys, 1):
        which = f"key {number} of {len(keys)}" if len(keys) > 1 else "the key"
        if not key:
            raise SettingsError(f"{option}: {which} is empty; give one that cannot be guessed")
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(
                f"{option}: {which} has a character in it that callers cannot send; "
                "take ASCII letters, digits and signs, without spaces"
            )


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(text: str) -> str:
    """A web site as browsers name it in `Origin`: scheme, host, a port that is not the usual."""
    if text == "*":
        return text
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        if host and ":" not in host:  # an IPv6 address stays as it is
            host = host.encode("idna").decode()
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    more = parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None
    if parts.scheme not in _DEFAULT_PORTS or not host or more:
        raise SettingsError(
            f"--allow-origin {text}: must be a site as in https://web.example, without a path; or *"
        )
    name = f"[{host}]" if ":" in host else host
    usual = port in (None, _DEFAULT_PORTS[parts.scheme])
    return f"{parts.scheme}://{name}" + ("" if usual else f":{port}")


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
