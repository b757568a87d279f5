"""`GET /v1/models`: the models that are served: a base model and its adapters."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from openpalm.serve.access.body import StrictRoute
from openpalm.serve.api import response_models
from openpalm.serve.api.requests import find_model
from openpalm.serve.api.response_models import ERRORS, responses
from openpalm.serve.service import Service
from openpalm.serve.worker import ServedModel


def routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/models/", include_in_schema=False)
    @router.get("/v1/models", responses={200: {"model": response_models.Models}, 401: ERRORS[401]})
    async def models() -> Response:
        data = [_model(served, service) for served in service.worker.models]
        body: response_models.Models = {"object": "list", "data": data}
        return JSONResponse(body)

    @router.get("/v1/models/{name:path}", responses=responses(response_models.Model))
    async def model(name: str) -> Response:
        return JSONResponse(_model(find_model(service.worker, name), service))

    return router


def _model(served: ServedModel, service: Service) -> response_models.Model:
    d = served.defaults
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "openpalm",
        "parent": None if served.adapter is None else service.worker.current.name,
        "max_model_len": served.context,
        "sampling": {"temperature": d.temperature, "top_p": d.top_p, "top_k": d.top_k},
        "takes_conversations": service.sink is not None,
    }
