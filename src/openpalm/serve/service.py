"""The state that all routes share: the worker, the model loader, the conversation sink."""

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Protocol

from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import ChatRequest
from openpalm.serve.api.responses import KeepConversation
from openpalm.serve.conversation_sink import ConversationSink
from openpalm.serve.metrics import Metrics
from openpalm.serve.worker import ServedModel, ServedSequence, Worker


class LoadModel(Protocol):
    """Loads a model to serve. Takes long: not for the event loop. Raises OpenPalmError."""

    def __call__(self, path: str, name: str | None) -> ServedModel: ...


class LoadAdapter(Protocol):
    """Loads an adapter over a served model. Takes long, as `LoadModel`. Raises OpenPalmError."""

    def __call__(self, base: ServedModel, path: str, name: str | None) -> ServedModel: ...


@dataclass
class Service:
    worker: Worker
    load_model: LoadModel
    load_adapter: LoadAdapter
    metrics: Metrics
    sink: ConversationSink | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_count(self, sequences: int) -> None:
        """Raises ApiError for more sequences than this server could ever take."""
        capacity = self.worker.capacity
        if sequences > capacity:
            raise ApiError(
                400,
                f"{sequences} sequences in one request; this server takes {capacity}: lower n or "
                "send fewer prompts in a request",
                param="n",
            )

    def conversation_keeper(
        self, body: ChatRequest, served: ServedModel
    ) -> KeepConversation | None:
        """Sends this request's completions to the sink; None without consent or without a sink."""
        sink = self.sink
        if sink is None or not body.store:
            return None
        messages = [{"role": m.role, "content": m.text} for m in body.messages]

        def keep(sequence: ServedSequence, text: str) -> None:
            sampling = asdict(sequence.request.sampling)
            sampling["logit_bias"] = dict(sequence.request.sampling.logit_bias)
            sink.put(
                {
                    "store": True,
                    "messages": messages,
                    "answer": text,
                    "model": served.name,
                    "checkpoint": served.source,
                    "sampling": sampling,
                    "created": time.time(),
                }
            )

        return keep
