"""From an application to a process: a socket, signals, an orderly end."""

import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from openpalm.errors import SettingsError, WorkError
from openpalm.serve.access.connections import BoundedProtocol
from openpalm.serve.worker import Worker

BACKLOG = 2048
GRACE_S = 5
"""Given to callers to take the last of an answer that was broken off."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        # create_server adds the address to the words, which say it twice then.
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise SettingsError(
            f"--host {host} --port {port}: cannot listen there ({reason}); try another --port"
        ) from None


def run(
    app: ASGIApp,
    listener: socket.socket,
    worker: Worker,
    *,
    drain_s: int,
    ready: Callable[[], None],
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in flight, at most `drain_s` seconds.

    A second signal breaks it off at once. `ready` is called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="error",  # a warning for each stranger who sends no HTTP would fill the log
        access_log=False,
        timeout_graceful_shutdown=drain_s + GRACE_S,
        server_header=False,
        backlog=BACKLOG,
    )
    server = _Server(config, worker, drain_s, ready)
    server.run(sockets=[listener])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, worker: Worker, drain_s: int, ready: Callable[[], None]
    ):
        super().__init__(config)
        self._drain_s = drain_s
        self._worker = worker
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the library's: that one raises the signal again at the end, and an orderly end
        # would look like a death.
        again, self.should_exit = self.should_exit, True
        self._worker.drain(0 if again else self._drain_s)
