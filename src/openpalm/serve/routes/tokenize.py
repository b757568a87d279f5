"""`POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.data.text.conversation import stop_ids
from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.request_fields import DetokenizeRequest, TokenizeRequest
from openpalm.serve.api.response_models import (
    ERRORS,
    Detokenized,
    Tokenized,
    TokenizerInfo,
    responses,
)
from openpalm.serve.api.responses import token_text
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.post("/tokenize", responses=responses(Tokenized))
    async def tokenize(body: TokenizeRequest) -> Response:
        served = requests.find_model(worker, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt")
        if body.messages is not None:
            ids = await requests.encode_messages(served.tokenizer, body.messages, body)
        elif body.prompt:
            (ids,) = await requests.encode_prompts(served.tokenizer, [body.prompt])
        else:
            ids = []  # a completion would put an end-of-text in the place of an empty prompt
        context = served.context
        tokenized: Tokenized = {"tokens": ids, "count": len(ids), "max_model_len": context}
        return JSONResponse(tokenized)

    @router.post("/detokenize", responses=responses(Detokenized))
    async def detokenize(body: DetokenizeRequest) -> Response:
        tokenizer = requests.find_model(worker, body.model).tokenizer
        with requests.tokenizer_errors():
            text = tokenizer.decode(body.tokens, skip_special=False)
        detokenized: Detokenized = {"prompt": text}
        return JSONResponse(detokenized)

    @router.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}, 401: ERRORS[401]})
    async def tokenizer_info() -> Response:
        return JSONResponse(_tokenizer_info(worker.current))

    return router


def _tokenizer_info(served: ServedModel) -> TokenizerInfo:
    """For clients that tokenize here instead of loading the tokenizer themselves."""
    tokenizer = served.tokenizer
    end = tokenizer.end_of_text
    name = None if end is None else token_text(tokenizer, end)
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
