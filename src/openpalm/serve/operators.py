"""What only holders of the admin key may do: replace the model, score sequences."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.generate.engine import Request as EngineRequest
from openpalm.serve import asking, documented
from openpalm.serve.answering import collect
from openpalm.serve.documented import ERRORS
from openpalm.serve.incoming import StrictRoute
from openpalm.serve.schema import LoadRequest, ScoreRequest
from openpalm.serve.service import Service
from openpalm.serve.stream import answer_or_nothing
from openpalm.serve.worker import in_own_thread


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)
    worker = service.worker

    @router.post("/admin/models", responses={200: {"model": documented.Loaded}, **ERRORS})
    async def load(body: LoadRequest) -> Response:
        """Loads a model and serves it from now on; requests in flight finish on the old one."""
        async with service.loading:  # two at once could be too much for the memory
            work = partial(service.load, body.path, body.name)
            served = await asyncio.to_thread(in_own_thread, work)
            before, worker.current = worker.current, served
        return JSONResponse({"model": served.name, "replaced": before.name})

    @router.post("/v1/score", responses={200: {"model": documented.Scores}, **ERRORS})
    async def score(body: ScoreRequest, request: Request) -> Response:
        """The log-probability of each sequence, and of each of its tokens after the first."""
        served = asking.pick_model(worker, body.model)
        service.check_count(len(body.sequences))
        given: Any = body.sequences
        if isinstance(given[0], str):
            given = await asking.encode(served.tokenizer, given)
        requests = [EngineRequest(ids, 0, score_prompt=True) for ids in given]
        for asked in requests:
            asking.check_fits(served, asked.ids)
        # A single token has nothing before it, and the engine nothing to do.
        answers = worker.submit(served, [r for r in requests if len(r.ids) > 1])

        async def whole() -> Response:
            await collect(answers)
            jobs = iter(answers.jobs)
            rows = [
                [token.log_prob for token in next(jobs).prompt] if len(r.ids) > 1 else []
                for r in requests
            ]
            scores = [
                {"index": i, "score": sum(row), "log_probs": row} for i, row in enumerate(rows)
            ]
            told = {"object": "list", "model": served.name, "kind": "log_prob", "data": scores}
            return JSONResponse(told)

        return await answer_or_nothing(request, whole(), answers.close)

    return router
