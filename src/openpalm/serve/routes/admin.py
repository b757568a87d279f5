"""What only holders of the admin key may do: replace the model, score sequences."""

import asyncio
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.errors import OpenPalmError
from openpalm.generate.engine import Request as EngineRequest
from openpalm.serve.access.auth import StrictRoute
from openpalm.serve.api import requests, response_models
from openpalm.serve.api.error_responses import ApiError, is_failure
from openpalm.serve.api.event_stream import answer_or_nothing
from openpalm.serve.api.request_fields import LoadRequest, ScoreRequest
from openpalm.serve.api.response_models import ERRORS
from openpalm.serve.api.responses import collect
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel, in_own_thread, reason


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.post("/admin/models", responses={200: {"model": response_models.Loaded}, **ERRORS})
    async def load(body: LoadRequest) -> Response:
        """Loads a model and serves it from now on; requests in flight finish on the old one."""
        async with service.loading:  # two at once could be too much for the memory
            served = await asyncio.to_thread(_loaded, partial(service.load, body.path, body.name))
            before, worker.current = worker.current, served
        return JSONResponse({"model": served.name, "replaced": before.name})

    @router.post("/v1/score", responses={200: {"model": response_models.Scores}, **ERRORS})
    async def score(body: ScoreRequest, request: Request) -> Response:
        """The log-probability of each sequence, and of each of its tokens after the first."""
        served = requests.pick_model(worker, body.model)
        service.check_count(len(body.sequences))
        given: Any = body.sequences
        if isinstance(given[0], str):
            given = await requests.encode(served.tokenizer, given)
        scored = [EngineRequest(ids, 0, score_prompt=True) for ids in given]
        for asked in scored:
            requests.check_fits(served, asked.ids)
        answers = worker.submit(served, scored)

        async def whole() -> Response:
            await collect(answers)
            rows = [[token.log_prob for token in job.prompt] for job in answers.jobs]
            scores = [
                {"index": i, "score": sum(row), "log_probs": row} for i, row in enumerate(rows)
            ]
            told = {"object": "list", "model": served.name, "kind": "log_prob", "data": scores}
            return JSONResponse(told)

        return await answer_or_nothing(request, whole(), answers.close)

    return router


def _loaded(load: Callable[[], ServedModel]) -> ServedModel:
    """Raises ApiError for whatever is wrong with a checkpoint; a hostile one breaks anything."""
    try:
        return in_own_thread(load)
    except OpenPalmError as error:
        raise ApiError(400, str(error), param="path") from None
    except BaseException as error:
        if not is_failure(error):
            raise
        traceback.print_exception(error)
        raise ApiError(400, f"path: cannot be loaded ({reason(error)})", param="path") from None
