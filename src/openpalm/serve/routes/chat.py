"""`POST /v1/chat/completions`: the next turn of a conversation."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from openpalm.generate.engine import Token
from openpalm.generate.streaming import Piece
from openpalm.serve.access.auth import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import ChatRequest
from openpalm.serve.api.response_models import ChatCompletion, answered
from openpalm.serve.api.responses import Said, respond, spelt
from openpalm.serve.service import Service
from openpalm.serve.worker import Job, ServedModel


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/chat/completions", responses=answered(ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        served = requests.pick_model(service.worker, body.model)
        usage = requests.check_stream_options(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        prompt = await requests.encode_messages(served.tokenizer, body.messages, body)
        service.check_count(body.n or 1)
        wanted = requests.engine_requests(
            body,
            served,
            [prompt],
            max_new_tokens=requests.token_limit(body),
            top_log_probs=body.top_logprobs or 0,
            chat=True,
        )
        answers = service.worker.submit(served, wanted, requests.stop_strings(body))
        form = _Form(body, served)
        return await respond(
            request,
            answers,
            form,
            prompt_tokens=len(prompt),
            stream=bool(body.stream),
            usage=usage,
            keep=service.keeper(body, served),
        )

    return router


class _Form:
    """Chat: messages, or deltas of them, and a list of tokens with their log-probabilities."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatRequest, served: ServedModel):
        self._tokenizer = served.tokenizer
        self._log_probs = bool(body.logprobs)

    def opening(self, job: Job) -> dict[str, Any]:
        return _delta(job, {"role": "assistant", "content": ""})

    def part(self, job: Job, piece: Piece) -> dict[str, Any]:
        return _delta(job, {"content": piece.text}, self._listed(piece.tokens))

    def ending(self, job: Job, finish: str) -> dict[str, Any]:
        return _delta(job, {}, None, finish)

    def choice(self, job: Job, said: Said) -> dict[str, Any]:
        return {
            "index": job.index,
            "message": {"role": "assistant", "content": said.text, "refusal": None},
            "logprobs": self._listed(said.tokens),
            "finish_reason": said.finish,
        }

    def _listed(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, Any] | None:
        if not self._log_probs:
            return None
        listed = [
            self._token(token.id, token.log_prob)
            | {"top_logprobs": [self._token(*other) for other in token.top]}
            for token, _ in tokens
        ]
        return {"content": listed, "refusal": None}

    def _token(self, token_id: int, log_prob: float) -> dict[str, Any]:
        special = token_id in self._tokenizer.special_ids
        return {
            "token": spelt(self._tokenizer, token_id),
            "logprob": log_prob,
            "bytes": None if special else list(self._tokenizer.bytes_of(token_id)),
        }


def _delta(
    job: Job,
    delta: dict[str, Any],
    log_probs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {"index": job.index, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
