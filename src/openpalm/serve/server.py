"""Runs the application as a process: listening socket, signals, graceful shutdown."""

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
"""After the shutdown timeout: time for callers to receive the error that ends their response."""


def bind(host: str, port: int) -> socket.socket:
    """Opens a listening socket; port 0 takes a free one. Raises SettingsError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        # str(error) repeats the address, which the message below already has.
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise SettingsError(
            f"--host {host} --port {port}: cannot listen there ({reason}); try another --port"
        ) from None


def run(
    app: ASGIApp,
    listener: socket.socket,
    worker: Worker,
    *,
    shutdown_timeout_s: int,
    ready: Callable[[], None],
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in flight within the timeout.

    A second signal ends them at once. `ready` is called when requests are accepted.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        log_level="error",  # uvicorn warns for every caller that does not send HTTP
        access_log=False,
        timeout_graceful_shutdown=shutdown_timeout_s + GRACE_S,
        server_header=False,
        backlog=BACKLOG,
    )
    server = _Server(config, worker, shutdown_timeout_s, ready)
    server.run(sockets=[listener])
    if not server.started:
        raise WorkError("the server did not start; its log says why")


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, worker: Worker, timeout_s: int, ready: Callable[[], None]
    ):
        super().__init__(config)
        self._shutdown_timeout_s = timeout_s
        self._worker = worker
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own handler raises the signal again at the end, so the process would end with
        # the signal instead of status 0.
        again, self.should_exit = self.should_exit, True
        self._worker.shut_down(0 if again else self._shutdown_timeout_s)
