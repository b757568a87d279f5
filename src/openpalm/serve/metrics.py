"""Prometheus metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.generate.streaming import TextDelta
from openpalm.serve.worker import ServedSequence, Worker

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Each server has its own registry, so that two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "openpalm_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self._generated = Counter(
            "openpalm_generated_tokens", "Tokens of finished sequences", registry=self.registry
        )
        self._prompt = Counter(
            "openpalm_prompt_tokens", "Prompt tokens of finished sequences", registry=self.registry
        )
        self._finished = Counter(
            "openpalm_sequences", "Finished sequences", ["reason"], registry=self.registry
        )
        self._first_token = Histogram(
            "openpalm_first_token_seconds",
            "Time from a request to its first token",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )

    def watch(self, worker: Worker) -> None:
        """Adds gauges that read the worker when Prometheus asks."""
        for name, description, read in (
            ("openpalm_max_sequences", "Limit of sequences generated at the same time", _slots),
            ("openpalm_sequences_running", "Sequences being generated", lambda w: w.running),
            ("openpalm_sequences_in_flight", "Sequences running or waiting", lambda w: w.in_flight),
            ("openpalm_prefilled_tokens", "Prompt tokens computed, not copied", _prefilled),
        ):
            gauge = Gauge(name, description, registry=self.registry)
            gauge.set_function(lambda read=read: read(worker))

    def observe(self, sequence: ServedSequence, delta: TextDelta) -> None:
        """Counts a sequence when it finishes."""
        if delta.finish is None:
            return
        self._generated.inc(sequence.generated)
        self._prompt.inc(len(sequence.request.ids))
        self._finished.labels(delta.finish).inc()
        self._first_token.observe(sequence.first_token_s or 0.0)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def count_requests(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware that counts responses by route and status."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # By route, not by path: callers could invent any number of paths.
                    route = getattr(scope.get("route"), "path", "other")
                    self._requests.labels(route, message["status"]).inc()
                await send(message)

            await app(scope, receive, count if scope["type"] == "http" else send)

        return counted


def _slots(worker: Worker) -> int:
    return worker.current.engine.slots


def _prefilled(worker: Worker) -> int:
    return worker.current.engine.prefilled_tokens
