"""`POST /v1/completions`: continues prompts, given as text or as token ids."""

import codecs
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.request import Token
from openpalm.generate.streaming import FinishReason, TextDelta
from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import CompletionRequest
from openpalm.serve.api.response_models import (
    ChunkHead,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogProbs,
    ResponseHead,
    Usage,
    streamed_responses,
)
from openpalm.serve.api.responses import CompletedText, respond, token_text
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel, ServedSequence

DEFAULT_MAX_TOKENS = 16


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/completions", responses=streamed_responses(Completion, CompletionChunk))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = requests.find_model(service.worker, body.model)
        include_usage = requests.include_usage(body)
        texts, prompts = await _prompts(body, served)
        service.check_count(len(prompts) * (body.n or 1))
        limit = requests.token_limit(body)
        if limit == 0 and not body.echo:
            raise ApiError(400, "max_tokens 0: only with echo", param="max_tokens")
        engine_requests = requests.engine_requests(
            body,
            served,
            prompts,
            max_new_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
            top_log_probs=body.logprobs or 0,
            score_prompt=bool(body.echo and body.logprobs is not None),
        )
        output = service.worker.submit(served, engine_requests, requests.stop_strings(body))
        return await respond(
            request,
            output,
            _CompletionFormat(body, served, texts, output.sequences),
            prompt_tokens=sum(map(len, prompts)),
            stream=bool(body.stream),
            include_usage=include_usage,
        )

    return router


async def _prompts(
    body: CompletionRequest, served: ServedModel
) -> tuple[list[str | None], list[list[int]]]:
    """The text of each prompt, None if it was given as ids; and the ids of each prompt."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        return given, await requests.encode_prompts(served.tokenizer, given)
    return [None] * len(given), given


class _CompletionFormat:
    """Text; log-probabilities as parallel lists. With `echo` the prompt comes first."""

    id_prefix = "cmpl"

    def __init__(
        self,
        body: CompletionRequest,
        served: ServedModel,
        texts: Sequence[str | None],
        sequences: Sequence[ServedSequence],
    ):
        self._tokenizer = served.tokenizer
        self._choices_per_prompt = body.n or 1
        self._with_log_probs = body.logprobs is not None
        self._echo = bool(body.echo)
        self._sequences = sequences
        first_choices = sequences[:: self._choices_per_prompt]
        self._prompt_texts = [
            self._tokenizer.decode(first.request.ids, skip_special=False) if text is None else text
            for text, first in zip(texts, first_choices, strict=True)
        ]

    def choice(self, sequence: ServedSequence, completed: CompletedText) -> CompletionChoice:
        prompt = self._prompt_text(sequence) if self._echo else ""
        log_probs = self._log_probs(sequence, completed.tokens, with_prompt=self._echo)
        return _choice(sequence, prompt + completed.text, log_probs, completed.finish)

    def response(
        self, head: ResponseHead, choices: list[CompletionChoice], usage: Usage
    ) -> Completion:
        return {**head, "object": "text_completion", "choices": choices, "usage": usage}

    def first_delta(self, sequence: ServedSequence) -> CompletionChoice | None:
        if not self._echo:
            return None
        log_probs = self._log_probs(sequence, [], with_prompt=True)
        return _choice(sequence, self._prompt_text(sequence), log_probs)

    def delta(self, sequence: ServedSequence, delta: TextDelta) -> CompletionChoice:
        return _choice(sequence, delta.text, self._log_probs(sequence, delta.tokens))

    def last_delta(self, sequence: ServedSequence, finish: FinishReason) -> CompletionChoice:
        return _choice(sequence, "", None, finish)

    def chunk(self, head: ChunkHead, choices: list[CompletionChoice]) -> CompletionChunk:
        return {**head, "object": "text_completion", "choices": choices}

    def _prompt_text(self, sequence: ServedSequence) -> str:
        return self._prompt_texts[sequence.index // self._choices_per_prompt]

    def _log_probs(
        self,
        sequence: ServedSequence,
        tokens: Sequence[tuple[Token, int]],
        *,
        with_prompt: bool = False,
    ) -> CompletionLogProbs | None:
        if not self._with_log_probs:
            return None
        lists = _LogProbLists(self._tokenizer, with_top=sequence.request.top_log_probs > 0)
        # With echo, offsets count from the beginning of the prompt.
        shift = len(self._prompt_text(sequence)) if self._echo else 0
        if with_prompt:
            lists.add_prompt(sequence.request.ids, self._scored_tokens(sequence))
        for token, start in tokens:
            lists.add(token, shift + start)
        return lists.fields

    def _scored_tokens(self, sequence: ServedSequence) -> list[Token]:
        """The prompt's scored tokens. If only the first choice of a prompt has them, they hold for
        the other choices too.
        """
        if sequence.request.score_prompt:
            return sequence.prompt_tokens
        first_choice = sequence.index - sequence.index % self._choices_per_prompt
        return self._sequences[first_choice].prompt_tokens


class _LogProbLists:
    """OpenAI's parallel lists: tokens, log-probabilities, top log-probabilities, offsets."""

    def __init__(self, tokenizer: Tokenizer, *, with_top: bool):
        self._tokenizer = tokenizer
        self.fields: CompletionLogProbs = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [] if with_top else None,
            "text_offset": [],
        }

    def add(self, token: Token, start: int) -> None:
        text = token_text(self._tokenizer, token.id)
        self._append(text, token.log_prob, self._top(token), start)

    def add_prompt(self, ids: Sequence[int], scored: Sequence[Token]) -> None:
        """Adds all tokens of a prompt. Nothing predicts the first, so it has no log-probability.

        An echoed prompt shows the names of special tokens, so they count as characters.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def length(token_id: int) -> int:
            token_bytes = self._tokenizer.bytes_of(token_id)
            if not token_bytes:
                return len(token_text(self._tokenizer, token_id))
            return len(decoder.decode(token_bytes))

        self._append(token_text(self._tokenizer, ids[0]), None, None, 0)
        start = length(ids[0])
        for token in scored:
            self.add(token, start)
            start += length(token.id)

    def _top(self, token: Token) -> dict[str, float]:
        """Log-probabilities by text. Of two tokens with the same text the likelier one counts."""
        top: dict[str, float] = {}
        for token_id, log_prob in (*token.top, (token.id, token.log_prob)):
            text = token_text(self._tokenizer, token_id)
            top[text] = max(log_prob, top.get(text, log_prob))
        return top

    def _append(
        self, text: str, log_prob: float | None, top: dict[str, float] | None, start: int
    ) -> None:
        self.fields["tokens"].append(text)
        self.fields["token_logprobs"].append(log_prob)
        self.fields["text_offset"].append(start)
        if self.fields["top_logprobs"] is not None:
            self.fields["top_logprobs"].append(top)


def _choice(
    sequence: ServedSequence,
    text: str,
    log_probs: CompletionLogProbs | None,
    finish: FinishReason | None = None,
) -> CompletionChoice:
    return {"index": sequence.index, "text": text, "logprobs": log_probs, "finish_reason": finish}
