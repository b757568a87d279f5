"""What operators watch, in Prometheus' text form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.generate.streaming import Piece
from openpalm.serve.worker import Job, Worker

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry a server, so that two in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "openpalm_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self._generated = Counter(
            "openpalm_generated_tokens", "Tokens of finished answers", registry=self.registry
        )
        self._prompt = Counter(
            "openpalm_prompt_tokens", "Tokens of prompts answered", registry=self.registry
        )
        self._finished = Counter(
            "openpalm_sequences", "Sequences finished", ["reason"], registry=self.registry
        )
        self._first = Histogram(
            "openpalm_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )

    def watch(self, worker: Worker) -> None:
        """Adds gauges that read the worker when they are asked."""
        for name, about, read in (
            ("openpalm_max_sequences", "Sequences that can be generated at once", _slots),
            ("openpalm_sequences_running", "Slots in use", lambda w: w.active),
            ("openpalm_sequences_in_flight", "Sequences in slots or waiting", lambda w: w.load),
            ("openpalm_prefilled_tokens", "Prompt tokens computed, not copied", _prefilled),
        ):
            gauge = Gauge(name, about, registry=self.registry)
            gauge.set_function(lambda read=read: read(worker))

    def observe(self, job: Job, piece: Piece) -> None:
        """Counts what a piece brought."""
        if piece.finish is None:
            return
        self._generated.inc(job.generated)
        self._prompt.inc(len(job.request.ids))
        self._finished.labels(piece.finish).inc()
        self._first.observe(job.first_s or 0.0)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def counted(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware that counts answers by route and status."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def watching(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # By the route, not the path: callers could invent any number of paths.
                    route = getattr(scope.get("route"), "path", "other")
                    self._requests.labels(route, message["status"]).inc()
                await send(message)

            await app(scope, receive, watching if scope["type"] == "http" else send)

        return wrapped


def _slots(worker: Worker) -> int:
    return worker.current.engine.slots


def _prefilled(worker: Worker) -> int:
    return worker.current.engine.prefilled_tokens
