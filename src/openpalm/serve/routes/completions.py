"""`POST /v1/completions`: prompts, as text or ids, continued."""

import codecs
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Token
from openpalm.generate.streaming import Piece
from openpalm.serve.access.auth import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import CompletionRequest
from openpalm.serve.api.response_models import Completion, answered
from openpalm.serve.api.responses import Said, respond, spelt
from openpalm.serve.service import Service
from openpalm.serve.worker import Job, ServedModel

DEFAULT_MAX_TOKENS = 16


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/completions", responses=answered(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served = requests.pick_model(service.worker, body.model)
        usage = requests.check_stream_options(body)
        texts, prompts = await _prompts(body, served)
        service.check_count(len(prompts) * (body.n or 1))
        limit = requests.token_limit(body)
        if limit == 0 and not body.echo:
            raise ApiError(400, "max_tokens 0: only with echo", param="max_tokens")
        wanted = requests.engine_requests(
            body,
            served,
            prompts,
            max_new_tokens=DEFAULT_MAX_TOKENS if limit is None else limit,
            top_log_probs=body.logprobs or 0,
            score_prompt=bool(body.echo and body.logprobs is not None),
        )
        answers = service.worker.submit(served, wanted, requests.stop_strings(body))
        form = _Form(body, served, texts, answers.jobs)
        return await respond(
            request,
            answers,
            form,
            prompt_tokens=sum(map(len, prompts)),
            stream=bool(body.stream),
            usage=usage,
        )

    return router


async def _prompts(
    body: CompletionRequest, served: ServedModel
) -> tuple[list[str | None], list[list[int]]]:
    """Texts where they were given as such, and the ids of every prompt."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        return given, await requests.encode(served.tokenizer, given)
    return [None] * len(given), given


class _Form:
    """Completions: text, and log-probabilities as parallel lists."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        body: CompletionRequest,
        served: ServedModel,
        texts: Sequence[str | None],
        jobs: Sequence[Job],
    ):
        self._tokenizer = served.tokenizer
        self._choices = body.n or 1
        self._log_probs = body.logprobs is not None
        self._echo = bool(body.echo)
        firsts = jobs[:: self._choices]
        self._texts = [
            self._tokenizer.decode(job.request.ids, skip_special=False) if text is None else text
            for text, job in zip(texts, firsts, strict=True)
        ]
        self._jobs = jobs

    def opening(self, job: Job) -> dict[str, Any] | None:
        if not self._echo:
            return None
        return _choice(job, self._prompt_text(job), self._listed(job, [], prompt=True))

    def part(self, job: Job, piece: Piece) -> dict[str, Any]:
        return _choice(job, piece.text, self._listed(job, piece.tokens))

    def ending(self, job: Job, finish: str) -> dict[str, Any]:
        return _choice(job, "", None, finish)

    def choice(self, job: Job, said: Said) -> dict[str, Any]:
        text = self._prompt_text(job) + said.text if self._echo else said.text
        log_probs = self._listed(job, said.tokens, prompt=self._echo)
        return _choice(job, text, log_probs, said.finish)

    def _prompt_text(self, job: Job) -> str:
        """The prompt as it was given, decoded where it was given as ids."""
        return self._texts[job.index // self._choices]

    def _listed(
        self, job: Job, tokens: Sequence[tuple[Token, int]], *, prompt: bool = False
    ) -> dict[str, Any] | None:
        """OpenAI's four parallel lists; a prompt's first token has no log-probability."""
        if not self._log_probs:
            return None
        lists = _Lists(self._tokenizer, job.request.top_log_probs > 0)
        shift = len(self._prompt_text(job)) if self._echo else 0
        if prompt:
            lists.add_prompt(job, self._scored(job))
        for token, start in tokens:
            lists.add(token, shift + start)
        return lists.fields

    def _scored(self, job: Job) -> list[Token]:
        """The prompt is scored with the first of its choices, or with each of them."""
        if job.request.score_prompt:
            return job.prompt
        return self._jobs[job.index - job.index % self._choices].prompt


class _Lists:
    def __init__(self, tokenizer: Tokenizer, with_top: bool):
        self._tokenizer = tokenizer
        self._with_top = with_top
        self.fields: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [] if with_top else None,
            "text_offset": [],
        }

    def add(self, token: Token, start: int) -> None:
        self._append(spelt(self._tokenizer, token.id), token.log_prob, self._top(token), start)

    def add_prompt(self, job: Job, scored: Sequence[Token]) -> None:
        """The prompt is shown with the names of special tokens, so they take room in it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def length(token_id: int) -> int:
            piece = self._tokenizer.bytes_of(token_id)
            return len(decoder.decode(piece) if piece else spelt(self._tokenizer, token_id))

        first = job.request.ids[0]
        self._append(spelt(self._tokenizer, first), None, None, 0)
        start = length(first)
        for token in scored:
            self.add(token, start)
            start += length(token.id)

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest by their text; of two that are spelt alike the likelier stays."""
        top: dict[str, float] = {}
        for other, log_prob in (*token.top, (token.id, token.log_prob)):
            name = spelt(self._tokenizer, other)
            top[name] = max(log_prob, top.get(name, log_prob))
        return top

    def _append(
        self, name: str, log_prob: float | None, top: dict[str, float] | None, start: int
    ) -> None:
        self.fields["tokens"].append(name)
        self.fields["token_logprobs"].append(log_prob)
        self.fields["text_offset"].append(start)
        if self._with_top:
            self.fields["top_logprobs"].append(top)


def _choice(
    job: Job, text: str, log_probs: dict[str, Any] | None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": job.index, "text": text, "logprobs": log_probs, "finish_reason": finish}
