"""The HTTP application: rooms put together, life signs, the page at `/`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import PurePath

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from openpalm import __version__
from openpalm.serve.access.auth import Door
from openpalm.serve.api import error_responses
from openpalm.serve.api.response_models import ERRORS
from openpalm.serve.routes import admin, chat, completions, tools
from openpalm.serve.service import Service
from openpalm.serve.worker import ShuttingDown

PAGE = files("openpalm.serve") / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> ASGIApp:
    """The application; its lifespan is that of the worker's thread."""

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()
        if service.sink:
            service.sink.close()

    app = FastAPI(
        lifespan=running,
        title="OpenPaLM",
        version=__version__,
        description="The OpenAI API, for one model.",
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
    )
    for room in (completions, chat, tools, admin):
        app.include_router(room.routes(service))
    _add_life_signs(app, service)
    _add_page(app)
    error_responses.install(app)
    _describe(app)
    counted = service.metrics.counted(app)
    admitted = Door(counted, keys=keys, admin_keys=admin_keys)
    if not allow_origins:
        return admitted
    return CORSMiddleware(
        admitted, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"]
    )


def _describe(app: FastAPI) -> None:
    """Makes /openapi.json say what is answered: no 422, and keys as bearer tokens."""
    schema = app.openapi()  # kept by the application
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{}, {"key": []}]


def _add_life_signs(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> Response:
        """New requests are taken."""
        if service.worker.draining:
            return error_responses.error_response(error_responses.as_api_error(ShuttingDown()))
        return JSONResponse({"status": "ready", "model": service.worker.current.name})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    # Read once, so that no path of a caller ever names a file.
    contents = {file.name: file.read_bytes() for file in PAGE.iterdir()}

    def page(name: str) -> Response:
        if name not in contents:
            raise error_responses.ApiError(404, f"no such file: {name[:100]}")
        kind = KINDS[PurePath(name).suffix]
        return Response(contents[name], headers=PAGE_HEADERS, media_type=kind)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return page(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return page("icon.svg")
