"""Answers in the two shapes of OpenAI's API, whole or streamed.

A Form says how one choice looks; everything else is the same for both.
"""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Token
from openpalm.generate.streaming import Piece
from openpalm.serve.api.error_responses import as_api_error, error_body, is_failure
from openpalm.serve.api.event_stream import DONE, EventStream, answer_or_nothing, event
from openpalm.serve.worker import Answers, Job


@dataclass
class Said:
    """What one choice consists of so far."""

    text: str = ""
    tokens: list[tuple[Token, int]] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


Keep = Callable[[Job, str], None]
"""Takes an answer, with its text, that its user agreed to share."""


class Form(Protocol):
    """How choices look in one of the two APIs."""

    prefix: str
    whole: str
    chunk: str

    def opening(self, job: Job) -> dict[str, Any] | None:
        """The part of a streamed choice that comes before its text, if there is one."""
        ...

    def part(self, job: Job, piece: Piece) -> dict[str, Any]:
        """A streamed choice's next part."""
        ...

    def ending(self, job: Job, finish: str) -> dict[str, Any]:
        """A streamed choice's last part."""
        ...

    def choice(self, job: Job, said: Said) -> dict[str, Any]:
        """A whole choice."""
        ...


async def respond(
    request: Request,
    answers: Answers,
    form: Form,
    *,
    prompt_tokens: int,
    stream: bool,
    usage: bool,
    keep: Keep | None = None,
) -> Response:
    """The whole answer, or a stream of it that may end with its usage; `keep` gets each choice."""
    head = {
        "id": f"{form.prefix}-{secrets.token_hex(12)}",
        "object": form.chunk if stream else form.whole,
        "created": int(time.time()),
        "model": answers.served.name,
    }
    if stream:
        events = _events(answers, form, head, prompt_tokens, usage, keep)
        return EventStream(events, answers.close)
    whole = _whole(answers, form, head, prompt_tokens, keep)
    return await answer_or_nothing(request, whole, answers.close)


async def collect(answers: Answers) -> list[Said]:
    """Everything that is said, in the order of the requests. Raises as Answers do."""
    said = [Said() for _ in answers.jobs]
    async for pieces in answers:
        for job, piece in pieces:
            said[job.index].add(piece)
    return said


async def _whole(
    answers: Answers, form: Form, head: dict[str, Any], prompt_tokens: int, keep: Keep | None
) -> JSONResponse:
    said = await collect(answers)
    if keep:
        for job in answers.jobs:
            keep(job, said[job.index].text)
    choices = [form.choice(job, said[job.index]) for job in answers.jobs]
    usage = _usage(answers.jobs, prompt_tokens)
    return JSONResponse(head | {"choices": choices, "usage": usage})


async def _events(
    answers: Answers,
    form: Form,
    head: dict[str, Any],
    prompt_tokens: int,
    usage: bool,
    keep: Keep | None,
) -> AsyncIterator[bytes]:
    """Chunks as bytes, everything that is ready in one write."""
    if usage:
        head = head | {"usage": None}

    def chunk(choice: dict[str, Any]) -> bytes:
        return event(head | {"choices": [choice]})

    opened: dict[Job, str] = {}
    try:
        async for pieces in answers:
            ready = b""
            for job, piece in pieces:
                if job not in opened:
                    opened[job] = ""
                    opening = form.opening(job)
                    ready += chunk(opening) if opening else b""
                if piece.text or piece.tokens:
                    ready += chunk(form.part(job, piece))
                opened[job] += piece.text if keep else ""
                if piece.finish:
                    if keep:
                        keep(job, opened[job])
                    ready += chunk(form.ending(job, piece.finish))
            if ready:
                yield ready
    except BaseException as error:  # whatever happens: the status is long sent
        if not is_failure(error):
            raise
        told = as_api_error(error)
        yield event(error_body(told.status, told.message, code=told.code))
        return
    if usage:
        yield event(head | {"choices": [], "usage": _usage(answers.jobs, prompt_tokens)})
    yield DONE


def _usage(jobs: Sequence[Job], prompt_tokens: int) -> dict[str, int]:
    made = sum(job.generated for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


# --- what tokens are called


def spelt(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; its bytes, where they are part of a character; a special token's name."""
    if token_id in tokenizer.special_ids:
        return tokenizer.decode([token_id], skip_special=False)
    piece = tokenizer.bytes_of(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
