"""Small endpoints beside generation: models, tokens, mesh-transformer-jax's /complete."""

from dataclasses import asdict

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.data.text.conversation import stop_ids
from openpalm.generate.engine import Request as EngineRequest
from openpalm.generate.sampling import Sampling
from openpalm.serve.access.auth import StrictRoute
from openpalm.serve.api import requests, response_models
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.event_stream import answer_or_nothing
from openpalm.serve.api.request_fields import DetokenizeRequest, LegacyRequest, TokenizeRequest
from openpalm.serve.api.response_models import ERRORS
from openpalm.serve.api.responses import collect, spelt
from openpalm.serve.service import Service
from openpalm.serve.worker import Overloaded, ServedModel

LEGACY_TOKENS = 512
"""What mesh-transformer-jax's server generated at most."""


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.get("/v1/models/", include_in_schema=False)
    @router.get("/v1/models", responses={200: {"model": response_models.Models}, 401: ERRORS[401]})
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(worker.current, service)]})

    @router.get(
        "/v1/models/{name:path}", responses={200: {"model": response_models.Model}, **ERRORS}
    )
    async def model(name: str) -> Response:
        return JSONResponse(_model(requests.pick_model(worker, name), service))

    @router.post("/tokenize", responses={200: {"model": response_models.Tokenized}, **ERRORS})
    async def tokenize(body: TokenizeRequest) -> Response:
        served = requests.pick_model(worker, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt")
        if body.prompt is not None:
            ids = (await requests.encode(served.tokenizer, [body.prompt]))[0] if body.prompt else []
        else:
            ids = await requests.encode_messages(served.tokenizer, body.messages or [], body)
        told = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
        return JSONResponse(told)

    @router.post("/detokenize", responses={200: {"model": response_models.Detokenized}, **ERRORS})
    async def detokenize(body: DetokenizeRequest) -> Response:
        tokenizer = requests.pick_model(worker, body.model).tokenizer
        with requests.tokenizing():
            text = tokenizer.decode(body.tokens, skip_special=False)
        return JSONResponse({"prompt": text})

    @router.get("/tokenizer_info", responses={401: ERRORS[401]})
    async def tokenizer_info() -> Response:
        return JSONResponse(_tokenizer_info(worker.current))

    @router.post(
        "/complete",
        responses={
            200: {"model": response_models.LegacyCompletion},
            **ERRORS,
            429: {"model": response_models.LegacyError},
        },
    )
    async def complete(body: LegacyRequest, request: Request) -> Response:
        served = worker.current
        (prompt,) = await requests.encode(served.tokenizer, [body.context])
        served.engine.check(prompt)
        room = min(LEGACY_TOKENS, served.context - len(prompt))
        if room < 1:
            raise ApiError(400, f"the context is too long; the model has {served.context} tokens")
        how = Sampling(temperature=body.temp, top_p=body.top_p, seed=requests.drawn_seed())
        ends = requests.ends(served.tokenizer, chat=False)
        try:
            answers = worker.submit(served, [EngineRequest(prompt, room, how, ends)])
        except Overloaded:
            busy = {"error": "queue full, try again later"}
            return JSONResponse(busy, 429, {"Retry-After": "1"})

        async def whole() -> Response:
            return JSONResponse({"completion": (await collect(answers))[0].text})

        return await answer_or_nothing(request, whole(), answers.close)

    return router


def _model(served: ServedModel, service: Service) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "openpalm",
        "max_model_len": served.context,
        "sampling": asdict(served.defaults),
        "takes_conversations": service.sink is not None,
    }


def _tokenizer_info(served: ServedModel) -> dict[str, object]:
    """What a remote evaluation needs to know instead of loading the tokenizer."""
    tokenizer = served.tokenizer
    end = tokenizer.end_of_text
    name = None if end is None else spelt(tokenizer, end)
    return {
        "tokenizer_class": "openpalm",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": served.context,
        "eos_token": name,
        "eos_token_id": end,
        "bos_token": None,
        "pad_token": name,
        "stop_token_ids": sorted(stop_ids(tokenizer)),
        "chat_template": None,
    }
