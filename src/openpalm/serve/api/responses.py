"""Builds the responses of completions and chat, whole or streamed.

A ResponseFormat writes the JSON of one of the two APIs; the rest is the same for both.
"""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.request import Token
from openpalm.generate.streaming import FinishReason, TextDelta
from openpalm.serve.api.error_responses import as_api_error, error_body, is_failure
from openpalm.serve.api.event_stream import DONE, EventStream, event, response_unless_disconnected
from openpalm.serve.api.response_models import ChunkHead, ResponseHead, Usage
from openpalm.serve.worker import OutputStream, ServedSequence


@dataclass
class CompletedText:
    """The text of one choice, with its tokens."""

    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    """each with the character of the text where it begins"""
    finish: FinishReason | None = None

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish = delta.finish


KeepConversation = Callable[[ServedSequence, str], None]
"""Called with each completion, and its text, that the user agreed to share."""


class ResponseFormat(Protocol):
    """The JSON of one of the two APIs."""

    id_prefix: str

    def choice(self, sequence: ServedSequence, completed: CompletedText) -> Any:
        """A choice of a whole response."""

    def response(
        self, head: ResponseHead, choices: list[Any], usage: Usage
    ) -> Mapping[str, object]:
        """A whole response."""
        ...

    def first_delta(self, sequence: ServedSequence) -> Any:
        """A streamed choice before its text begins; None if it begins with the text."""

    def delta(self, sequence: ServedSequence, delta: TextDelta) -> Any:
        """A streamed choice with its next text."""

    def last_delta(self, sequence: ServedSequence, finish: FinishReason) -> Any:
        """A streamed choice with its finish reason."""

    def chunk(self, head: ChunkHead, choices: list[Any]) -> Mapping[str, object]:
        """A chunk of a stream."""
        ...


async def respond(
    request: Request,
    output: OutputStream,
    format: ResponseFormat,
    *,
    prompt_tokens: int,
    stream: bool,
    include_usage: bool,
    keep: KeepConversation | None = None,
) -> Response:
    """The whole response, or a stream of it that may end with its usage."""
    head: ResponseHead = {
        "id": f"{format.id_prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": output.served.name,
    }
    if stream:
        chunk_head: ChunkHead = {**head, "usage": None} if include_usage else {**head}
        events = _events(output, format, chunk_head, prompt_tokens, keep)
        return EventStream(events, output.close)
    whole = _whole(output, format, head, prompt_tokens, keep)
    return await response_unless_disconnected(request, whole, output.close)


async def collect(output: OutputStream) -> list[CompletedText]:
    """The completed text of every sequence, in order. Raises as OutputStream does."""
    completed = [CompletedText() for _ in output.sequences]
    async for deltas in output:
        for sequence, delta in deltas:
            completed[sequence.index].add(delta)
    return completed


async def _whole(
    output: OutputStream,
    format: ResponseFormat,
    head: ResponseHead,
    prompt_tokens: int,
    keep: KeepConversation | None,
) -> JSONResponse:
    completed = await collect(output)
    if keep:
        for sequence in output.sequences:
            keep(sequence, completed[sequence.index].text)
    choices = [format.choice(sequence, completed[sequence.index]) for sequence in output.sequences]
    return JSONResponse(format.response(head, choices, _usage(output.sequences, prompt_tokens)))


async def _events(
    output: OutputStream,
    format: ResponseFormat,
    head: ChunkHead,
    prompt_tokens: int,
    keep: KeepConversation | None,
) -> AsyncIterator[bytes]:
    """Chunks as bytes; all chunks that are ready at the same time go out in one write."""

    def chunk(choice: Any) -> bytes:
        return event(format.chunk(head, [choice]))

    texts: dict[ServedSequence, str] = {}
    try:
        async for deltas in output:
            ready = b""
            for sequence, delta in deltas:
                if sequence not in texts:
                    texts[sequence] = ""
                    first = format.first_delta(sequence)
                    ready += chunk(first) if first else b""
                if delta.text or delta.tokens:
                    ready += chunk(format.delta(sequence, delta))
                texts[sequence] += delta.text if keep else ""
                if delta.finish:
                    if keep:
                        keep(sequence, texts[sequence])
                    ready += chunk(format.last_delta(sequence, delta.finish))
            if ready:
                yield ready
    except BaseException as error:  # the status is already sent, so the error is an event
        if not is_failure(error):
            raise
        api_error = as_api_error(error)
        yield event(error_body(api_error.status, api_error.message, code=api_error.code))
        return
    if "usage" in head:
        usage = _usage(output.sequences, prompt_tokens)
        yield event(format.chunk({**head, "usage": usage}, []))
    yield DONE


def _usage(sequences: Sequence[ServedSequence], prompt_tokens: int) -> Usage:
    generated = sum(sequence.generated for sequence in sequences)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as the API writes it: its text, its bytes if they are part of a character, or the
    name of a special token.
    """
    if token_id in tokenizer.special_ids:
        return tokenizer.decode([token_id], skip_special=False)
    token_bytes = tokenizer.bytes_of(token_id)
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)
