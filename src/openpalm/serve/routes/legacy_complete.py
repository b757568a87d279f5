"""`POST /complete`: the endpoint of mesh-transformer-jax's server, for its clients."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.generate.request import Request as EngineRequest
from openpalm.generate.sampling import Sampling
from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError
from openpalm.serve.api.event_stream import response_unless_disconnected
from openpalm.serve.api.request_fields import LegacyRequest
from openpalm.serve.api.response_models import LegacyCompletion, LegacyError, responses
from openpalm.serve.api.responses import collect
from openpalm.serve.service import Service
from openpalm.serve.worker import Overloaded

MAX_NEW_TOKENS = 512
"""The limit of mesh-transformer-jax's server."""


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.post(
        "/complete", responses={**responses(LegacyCompletion), 429: {"model": LegacyError}}
    )
    async def complete(body: LegacyRequest, request: Request) -> Response:
        served = worker.current
        (prompt,) = await requests.encode_prompts(served.tokenizer, [body.context])
        served.engine.check(prompt)
        new_tokens = min(MAX_NEW_TOKENS, served.context - len(prompt))
        if new_tokens < 1:
            raise ApiError(
                400, f"context: too long; the model's context is {served.context} tokens"
            )
        sampling = Sampling(temperature=body.temp, top_p=body.top_p, seed=requests.random_seed())
        ends = requests.end_ids(served.tokenizer, chat=False)
        try:
            output = worker.submit(served, [EngineRequest(prompt, new_tokens, sampling, ends)])
        except Overloaded:
            error: LegacyError = {"error": "queue full, try again later"}
            return JSONResponse(error, 429, {"Retry-After": "1"})

        async def whole() -> Response:
            completion: LegacyCompletion = {"completion": (await collect(output))[0].text}
            return JSONResponse(completion)

        return await response_unless_disconnected(request, whole(), output.close)

    return router
