"""The web process: waitress, which finishes its requests before it ends."""

import logging
import os
import signal
import socket
import time
from typing import Any

THREADS = 8
GRACE_S = 30.0
"""after SIGTERM: time for requests in flight"""
SOCKET_VARIABLE = "OPENPALM_FEEDBACK_SOCKET"
"""number of a listening socket that the parent opened; it outlives a crash of this process"""
_LOOK_EVERY_S = 0.25


def listener(host: str, port: int) -> socket.socket:
    """The parent's listening socket, or a new one. Raises OSError."""
    given = os.environ.get(SOCKET_VARIABLE)
    if given:
        return socket.socket(fileno=int(given))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def serve(listening: socket.socket) -> None:
    """Answers until SIGTERM or SIGINT, then finishes the requests in flight."""
    from django.conf import settings
    from waitress import wasyncore
    from waitress.server import create_server

    from openpalm.feedback.wsgi import application

    # Requests that wait for a thread are normal: no warnings about them.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server: Any = create_server(
        application,
        sockets=[listening],
        threads=THREADS,
        ident="",
        channel_timeout=60,
        # Slow connections hold no thread, but would use up waitress' default of 100.
        connection_limit=1000,
        # waitress stores a body before the application sees it; see accounts/middleware.body_limit.
        max_request_body_size=settings.FEEDBACK_MAX_UPLOAD_BYTES + 2**20,
        # Headers about HTTPS and the visitor's address are trusted only from a proxy.
        clear_untrusted_proxy_headers=not settings.FEEDBACK_PROXIES,
    )
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, frame: signals.append(caught))
    give_up_at = None
    while not signals or _is_busy(server):
        if signals and give_up_at is None:
            give_up_at = time.monotonic() + GRACE_S
            server.del_channel()
            # Otherwise new visitors would wait in its queue, and the port would stay taken. A
            # parent that restarts this process has the socket too.
            listening.close()
        if len(signals) > 1 or (give_up_at and time.monotonic() > give_up_at):
            break
        wasyncore.loop(timeout=_LOOK_EVERY_S, map=server._map, use_poll=True, count=1)
    server.task_dispatcher.shutdown(timeout=1)


def _is_busy(server: Any) -> bool:
    """Whether a request is being read or answered; an idle connection is not waited for."""
    channels = list(server.active_channels.values())
    return any(
        channel.requests or channel.request is not None or channel.total_outbufs_len
        for channel in channels
    )
