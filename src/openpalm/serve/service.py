"""What every route works with: the worker, how models are loaded, where conversations go."""

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Protocol

from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import ChatRequest
from openpalm.serve.api.responses import Keep
from openpalm.serve.conversation_sink import ConversationSink
from openpalm.serve.metrics import Metrics
from openpalm.serve.worker import Job, ServedModel, Worker


class Load(Protocol):
    """Makes a model ready to serve, outside of the event loop. Raises OpenPalmError."""

    def __call__(self, path: str, name: str | None) -> ServedModel: ...


@dataclass
class Service:
    worker: Worker
    load: Load
    metrics: Metrics
    sink: ConversationSink | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_count(self, sequences: int) -> None:
        """Raises ApiError for more than this server could ever run."""
        most = self.worker.most
        if sequences > most:
            raise ApiError(
                400,
                f"{sequences} sequences at once; this server takes {most}: lower n or send "
                "fewer prompts in a request",
                param="n",
            )

    def keeper(self, body: ChatRequest, served: ServedModel) -> Keep | None:
        """Where the answers to this request are kept; None without consent or a place."""
        sink = self.sink
        if sink is None or not body.store:
            return None
        messages = [{"role": m.role, "content": m.text} for m in body.messages]

        def keep(job: Job, text: str) -> None:
            how = asdict(job.request.sampling)
            how["logit_bias"] = dict(job.request.sampling.logit_bias)
            sink.put(
                {
                    "messages": messages,
                    "answer": text,
                    "model": served.name,
                    "checkpoint": served.source,
                    "sampling": how,
                    "created": time.time(),
                }
            )

        return keep
