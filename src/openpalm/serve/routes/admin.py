"""Endpoints for the admin key: replace the model, add and remove adapters, score sequences."""

import asyncio
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.errors import OpenPalmError
from openpalm.generate.request import Request as EngineRequest
from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import requests
from openpalm.serve.api.error_responses import ApiError, is_failure
from openpalm.serve.api.event_stream import response_unless_disconnected
from openpalm.serve.api.request_fields import LoadAdapterRequest, LoadRequest, ScoreRequest
from openpalm.serve.api.response_models import (
    LoadedAdapter,
    LoadedModel,
    RemovedAdapter,
    Score,
    Scores,
    responses,
)
from openpalm.serve.api.responses import collect
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel, error_line, run_in_new_thread


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.post("/admin/models", responses=responses(LoadedModel))
    async def load(body: LoadRequest) -> Response:
        """Loads a model and serves it. Requests in flight finish on the old model."""
        async with service.loading:  # memory may not hold two new models at the same time
            load_model = partial(service.load_model, body.path, body.name)
            served = await asyncio.to_thread(_load, load_model)
            # New requests go to the new model from here on. The worker thread keeps running the
            # old one until its last sequence ends.
            replaced, *adapters = worker.replace_model(served)
        loaded: LoadedModel = {
            "model": served.name,
            "replaced": replaced.name,
            "removed_adapters": [adapter.name for adapter in adapters],
        }
        return JSONResponse(loaded)

    @router.post("/admin/adapters", responses=responses(LoadedAdapter))
    async def add_adapter(body: LoadAdapterRequest) -> Response:
        """Loads an adapter and serves it under its own name."""
        async with service.loading:
            base = worker.current
            load_adapter = partial(service.load_adapter, base, body.path, body.name)
            served = await asyncio.to_thread(_load, load_adapter)
            if any(each.name == served.name for each in worker.models):
                raise ApiError(
                    400,
                    f"name: {served.name!r} is served already; remove it first, or give this "
                    "adapter another name",
                    param="name",
                )
            worker.adapters[served.name] = served
        loaded: LoadedAdapter = {"model": served.name, "parent": base.name}
        return JSONResponse(loaded)

    @router.delete("/admin/adapters/{name:path}", responses=responses(RemovedAdapter))
    async def remove_adapter(name: str) -> Response:
        """Stops serving an adapter. Its requests in flight finish, then its memory is free."""
        async with service.loading:  # an adapter that is being loaded can be removed afterwards
            if worker.adapters.pop(name, None) is None:
                names = ", ".join(map(repr, worker.adapters))[:1000] or "none"
                raise ApiError(
                    404,
                    f"the adapter {name[:200]!r} is not served here; this server has {names}",
                    code="model_not_found",
                )
        removed: RemovedAdapter = {"removed": name}
        return JSONResponse(removed)

    @router.post("/v1/score", responses=responses(Scores))
    async def score(body: ScoreRequest, request: Request) -> Response:
        """The log-probability of each sequence, and of each of its tokens but the first."""
        served = requests.find_model(worker, body.model)
        service.check_count(len(body.sequences))
        sequences: Any = body.sequences
        if isinstance(sequences[0], str):
            sequences = await requests.encode_prompts(served.tokenizer, sequences)
        for ids in sequences:
            requests.check_fits(served, ids)
        engine_requests = [EngineRequest(ids, 0, score_prompt=True) for ids in sequences]
        output = worker.submit(served, engine_requests)

        async def whole() -> Response:
            await collect(output)
            rows = [[token.log_prob for token in s.prompt_tokens] for s in output.sequences]
            data: list[Score] = [
                {"index": i, "score": sum(row), "log_probs": row} for i, row in enumerate(rows)
            ]
            name = served.name
            scores: Scores = {"object": "list", "model": name, "kind": "log_prob", "data": data}
            return JSONResponse(scores)

        return await response_unless_disconnected(request, whole(), output.close)

    return router


def _load(load_model: Callable[[], ServedModel]) -> ServedModel:
    """Raises ApiError for any failure: a damaged or hostile checkpoint may raise anything."""
    try:
        return run_in_new_thread(load_model)
    except OpenPalmError as error:
        raise ApiError(400, str(error), param="path") from None
    except BaseException as error:
        if not is_failure(error):
            raise
        traceback.print_exception(error)
        message = f"path: cannot be loaded ({error_line(error)})"
        raise ApiError(400, message, param="path") from None
