"""`openpalm serve`: serves a model over the OpenAI API, with a chat page."""

import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from socket import socket
from urllib.parse import urlsplit

from openpalm.base.settings import parse, spell
from openpalm.cli.model_options import BaseModelOptions
from openpalm.errors import SettingsError


@dataclass(frozen=True)
class ServeSettings(BaseModelOptions):
    """The model to serve, the address, the keys and the limits."""

    path: str
    """run, checkpoint or hub name"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 listens at all addresses of this machine and needs --api-key"""
    port: int = 8000
    """port to listen at; 0 takes a free one"""
    api_key: list[str] | str | None = None
    """key that callers send as a bearer token, or a JSON list of several; OPENPALM_API_KEY instead
    hides it from other users of the machine"""
    admin_key: str | None = None
    """key for /admin/models and /v1/score, which are closed without it; or OPENPALM_ADMIN_KEY"""
    name: str | None = None
    """name of the model in the API; default: the run's name"""
    adapter: list[str] | str | None = None
    """LoRA adapter of the model, served under a name of its own: NAME=PATH, or PATH, then the name
    is the run's; give the option again for another. PATH is a run, a checkpoint or a directory in
    PEFT's layout"""
    max_sequences: int = 32
    """sequences generated at the same time"""
    max_queue: int = 256
    """sequences that may wait; further requests get status 429"""
    shutdown_timeout: int = 60
    """seconds to finish the requests in flight after SIGTERM or Ctrl-C"""
    allow_origin: list[str] | str | None = None
    """web site that may call this server from browsers (CORS), or a JSON list of several; * allows
    all"""
    conversation_url: str | None = None
    """URL to post conversations to, as JSON, if the request has `"store": true` (user consent)"""
    feedback: bool = False
    """also run the feedback site and its worker: judge answers, train on them, promote the result;
    conversations that users share go to the site's first project"""
    feedback_port: int = 8080
    """with --feedback: port of the site; 0 takes a free one"""
    feedback_dir: str | None = None
    """with --feedback: folder of its database, snapshots and runs; default: OPENPALM_FEEDBACK_DIR,
    or feedback"""

    def __post_init__(self) -> None:
        for name in ("port", "feedback_port"):
            value = getattr(self, name)
            if not 0 <= value < 65536:
                raise SettingsError(f"{spell(name)} {value}: must be 0 (any free one) to 65535")
        for name, least in (("max_sequences", 1), ("max_queue", 0), ("shutdown_timeout", 0)):
            value = getattr(self, name)
            if value < least:
                raise SettingsError(f"{spell(name)} {value}: must be {least} or more")
        _check_keys("--api-key (or OPENPALM_API_KEY)", self.keys, given=self.api_key is not None)
        _check_keys("--admin-key (or OPENPALM_ADMIN_KEY)", self.admin_keys)
        _ = self.adapters, self.origins  # raises SettingsError if one is wrong
        if not self.keys and not _is_local(self.host):
            raise SettingsError(
                f"--host {self.host}: anyone on the network could use the model; give --api-key "
                "(or OPENPALM_API_KEY), or listen at 127.0.0.1"
            )

    @property
    def model_name(self) -> str:
        return self.name or run_name(self.path)

    @property
    def adapters(self) -> dict[str, str]:
        """Path of each adapter by its name. Raises SettingsError for a name that is given twice."""
        adapters: dict[str, str] = {}
        for text in _value_list(self.adapter):
            name, path = _named_adapter(text)
            if name in (self.model_name, *adapters):
                raise SettingsError(
                    f"--adapter {text}: another model is named {name!r}; choose another name with "
                    "--adapter NAME=PATH"
                )
            adapters[name] = path
        return adapters

    @property
    def keys(self) -> list[str]:
        return _value_list(self.api_key, "OPENPALM_API_KEY")

    @property
    def admin_keys(self) -> list[str]:
        return _value_list(self.admin_key, "OPENPALM_ADMIN_KEY")

    @property
    def origins(self) -> list[str]:
        """In the spelling of browsers. Raises SettingsError for a value that no browser sends."""
        return [_origin(text) for text in _value_list(self.allow_origin)]


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ServeSettings,
        argv,
        verb="serve",
        about="Serves a model over HTTP: the OpenAI API at /v1, a chat page at /.",
        examples=[
            "openpalm serve runs/quickstart/sft",
            "OPENPALM_API_KEY=... openpalm serve runs/chat --host 0.0.0.0 --port 80",
            "openpalm serve runs/chat --name assistant --max-sequences 64 --quantize int8",
            "openpalm serve runs/base --adapter maths=runs/maths --adapter runs/poetry",
            "openpalm serve runs/chat --feedback",
        ],
        positional=["path"],
    )
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise SettingsError(
            f"{error.name} is missing; `pip install 'openpalm[serve]'` installs the packages that "
            "serving needs"
        ) from None
    del fastapi, prometheus_client, uvicorn
    if settings.feedback:
        from openpalm.cli import serve_feedback

        serve_feedback.run(settings)
        return
    from openpalm.serve import server

    # Before the model is loaded, so that a port in use is reported at once.
    listener = server.bind(settings.host, settings.port)
    with listener:
        _serve(settings, listener)


def _serve(settings: ServeSettings, listener: socket) -> None:
    from rich.console import Console

    from openpalm.cli.load_served import first_models, load_adapter, load_model
    from openpalm.serve import server
    from openpalm.serve.app import create_app
    from openpalm.serve.conversation_sink import ConversationSink
    from openpalm.serve.metrics import Metrics
    from openpalm.serve.service import Service
    from openpalm.serve.worker import Worker, run_in_new_thread

    sink = ConversationSink(settings.conversation_url) if settings.conversation_url else None
    metrics = Metrics()
    with Console(stderr=True).status(f"loading {settings.path}"):
        served, *adapters = run_in_new_thread(lambda: first_models(settings))
    worker = Worker(served, max_queue=settings.max_queue, observe=metrics.observe)
    worker.adapters = {adapter.name: adapter for adapter in adapters}
    metrics.watch(worker)
    load, add = partial(load_model, settings), partial(load_adapter, settings)
    app = create_app(
        Service(worker, load, add, metrics, sink),
        keys=settings.keys,
        admin_keys=settings.admin_keys,
        allow_origins=settings.origins,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    names = ", ".join(each.name for each in worker.models)

    def ready() -> None:
        print(
            f"{names}: chat page at http://{shown}:{port}/, OpenAI API at "
            f"http://{shown}:{port}/v1; Ctrl-C stops the server",
            flush=True,
        )

    server.run(app, listener, worker, shutdown_timeout_s=settings.shutdown_timeout, ready=ready)


def run_name(path: str) -> str:
    """The run's name, from the path of a checkpoint: runs/tiny/checkpoints/step-10 is tiny."""
    parts = Path(path).resolve().parts
    if len(parts) > 1 and parts[-1] == "adapter" and parts[-2].startswith("step-"):
        parts = parts[:-1]
    parts = [part for part in parts if part != "checkpoints" and not part.startswith("step-")]
    return parts[-1] if parts else path


def _named_adapter(text: str) -> tuple[str, str]:
    """Name and path of an adapter. A = after a slash is part of a path: runs/lr=0.1 has no name."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        name, path = run_name(text), text
    if not name or not path:
        raise SettingsError(f"--adapter {text!r}: give NAME=PATH, or PATH")
    return name, path


def _value_list(given: list[str] | str | None, variable: str | None = None) -> list[str]:
    """The values without surrounding white space. A text that is a JSON list has several."""
    if given is None and variable:
        given = os.environ.get(variable)
    if isinstance(given, str) and given.strip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError:
            raise SettingsError(
                f"{variable or given}: begins like a JSON list but is not valid JSON; "
                'give one value, or several as ["one", "two"]'
            ) from None
    values = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(value, str) for value in values):
        raise SettingsError(f'{variable or given}: give strings, as in ["one", "two"]')
    return [value.strip() for value in values]


def _check_keys(option: str, keys: Sequence[str], *, given: bool = False) -> None:
    """Raises SettingsError for a key that no caller could send. The message hides the key."""
    if given and not keys:
        raise SettingsError(f"{option}: the list is empty; give a key, or leave the option out")
    for number, key in enumerate(keys, 1):
        which = f"key {number} of {len(keys)}" if len(keys) > 1 else "the key"
        if not key:
            raise SettingsError(f"{option}: {which} is empty; give one that cannot be guessed")
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(
                f"{option}: {which} has a character that callers cannot send; "
                "use ASCII letters, digits and signs, without spaces"
            )


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _origin(text: str) -> str:
    """A web site as browsers write it in `Origin`: scheme, host, port unless it is the default."""
    if text == "*":
        return text
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
        if host and ":" not in host:  # an IPv6 address stays as it is
            host = host.encode("idna").decode()
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None
    if parts.scheme not in _DEFAULT_PORTS or not host or extra:
        raise SettingsError(
            f"--allow-origin {text}: must be * or a site like https://web.example, without a path"
        )
    name = f"[{host}]" if ":" in host else host
    is_default = port in (None, _DEFAULT_PORTS[parts.scheme])
    return f"{parts.scheme}://{name}" + ("" if is_default else f":{port}")


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
