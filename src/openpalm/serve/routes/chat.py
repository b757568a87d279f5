"""`POST /v1/chat/completions`: the next turn of a conversation."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from openpalm.generate.request import Token
from openpalm.generate.streaming import FinishReason, TextDelta
from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import ChatRequest
from openpalm.serve.api.response_models import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogProbs,
    ChatToken,
    ChunkHead,
    ResponseHead,
    TopToken,
    Usage,
    streamed_responses,
)
from openpalm.serve.api.responses import CompletedText, respond, token_text
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel, ServedSequence


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post(
        "/v1/chat/completions", responses=streamed_responses(ChatCompletion, ChatCompletionChunk)
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        served = requests.find_model(service.worker, body.model)
        include_usage = requests.include_usage(body)
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        prompt = await requests.encode_messages(served.tokenizer, body.messages, body)
        service.check_count(body.n or 1)
        engine_requests = requests.engine_requests(
            body,
            served,
            [prompt],
            max_new_tokens=requests.token_limit(body),
            top_log_probs=body.top_logprobs or 0,
            chat=True,
        )
        output = service.worker.submit(served, engine_requests, requests.stop_strings(body))
        return await respond(
            request,
            output,
            _ChatFormat(body, served),
            prompt_tokens=len(prompt),
            stream=bool(body.stream),
            include_usage=include_usage,
            keep=service.conversation_keeper(body, served),
        )

    return router


class _ChatFormat:
    """Messages, or deltas of them; log-probabilities as a list of tokens."""

    id_prefix = "chatcmpl"

    def __init__(self, body: ChatRequest, served: ServedModel):
        self._tokenizer = served.tokenizer
        self._with_log_probs = bool(body.logprobs)

    def choice(self, sequence: ServedSequence, completed: CompletedText) -> ChatChoice:
        return {
            "index": sequence.index,
            "message": {"role": "assistant", "content": completed.text, "refusal": None},
            "logprobs": self._log_probs(completed.tokens),
            "finish_reason": completed.finish,
        }

    def response(
        self, head: ResponseHead, choices: list[ChatChoice], usage: Usage
    ) -> ChatCompletion:
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage}

    def first_delta(self, sequence: ServedSequence) -> ChatChunkChoice:
        return _delta(sequence, {"role": "assistant", "content": ""})

    def delta(self, sequence: ServedSequence, delta: TextDelta) -> ChatChunkChoice:
        return _delta(sequence, {"content": delta.text}, self._log_probs(delta.tokens))

    def last_delta(self, sequence: ServedSequence, finish: FinishReason) -> ChatChunkChoice:
        return _delta(sequence, {}, None, finish)

    def chunk(self, head: ChunkHead, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        return {**head, "object": "chat.completion.chunk", "choices": choices}

    def _log_probs(self, tokens: Sequence[tuple[Token, int]]) -> ChatLogProbs | None:
        if not self._with_log_probs:
            return None
        content: list[ChatToken] = [
            {
                **self._token(token.id, token.log_prob),
                "top_logprobs": [self._token(*top) for top in token.top],
            }
            for token, _ in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, log_prob: float) -> TopToken:
        is_special = token_id in self._tokenizer.special_ids
        return {
            "token": token_text(self._tokenizer, token_id),
            "logprob": log_prob,
            "bytes": None if is_special else list(self._tokenizer.bytes_of(token_id)),
        }


def _delta(
    sequence: ServedSequence,
    delta: ChatDelta,
    log_probs: ChatLogProbs | None = None,
    finish: FinishReason | None = None,
) -> ChatChunkChoice:
    index = sequence.index
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
