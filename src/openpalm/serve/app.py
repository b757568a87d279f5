"""Assembles the HTTP application: middleware, routes, health checks, the chat page at `/`."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import PurePath

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from openpalm import __version__
from openpalm.serve.access.auth import AuthMiddleware
from openpalm.serve.access.body import BodyMiddleware
from openpalm.serve.api import error_responses
from openpalm.serve.api.error_responses import CatchAllMiddleware
from openpalm.serve.api.response_models import ERRORS, chunk_schemas
from openpalm.serve.routes import admin, chat, completions, legacy_complete, models, tokenize
from openpalm.serve.service import Service
from openpalm.serve.worker import ShuttingDown

PAGE = files("openpalm.serve") / "page"
MEDIA_TYPES = {
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
    """The ASGI application. Its lifespan starts and stops the worker thread."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()
        if service.sink:
            service.sink.close()

    app = FastAPI(
        lifespan=lifespan,
        title="OpenPaLM",
        version=__version__,
        description="The OpenAI API, for one model and its LoRA adapters.",
        docs_url=None,  # FastAPI's documentation page loads scripts from another site
        redoc_url=None,
    )
    for router in (completions, chat, legacy_complete, models, tokenize, admin):
        app.include_router(router.routes(service))
    _add_health_routes(app, service)
    _add_page(app)
    error_responses.install(app)
    _correct_schema(app)
    # From the inside out: each one sees only the requests that the later ones let through.
    guarded = CatchAllMiddleware(service.metrics.count_requests(app))
    bounded = BodyMiddleware(_head_as_get(guarded))
    authorized = AuthMiddleware(bounded, keys=keys, admin_keys=admin_keys)
    if not allow_origins:
        return authorized
    return CORSMiddleware(
        authorized, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"]
    )


def _head_as_get(app: ASGIApp) -> ASGIApp:
    """Answers HEAD as GET; the server leaves out the body."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return middleware


def _correct_schema(app: FastAPI) -> None:
    """Corrects /openapi.json: no 422, bearer keys, the chunks of streams."""
    schema = app.openapi()  # FastAPI keeps this object and serves it
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    schema["components"]["schemas"] |= chunk_schemas()
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{}, {"key": []}]


def _add_health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """The process is alive."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> Response:
        """The server accepts requests."""
        if service.worker.shutting_down:
            return error_responses.error_response(error_responses.as_api_error(ShuttingDown()))
        return JSONResponse({"status": "ready", "model": service.worker.current.name})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    # All files are read once, so a request's path never reaches the file system.
    contents = {file.name: file.read_bytes() for file in PAGE.iterdir()}

    def page(name: str) -> Response:
        if name not in contents:
            raise error_responses.ApiError(404, f"no such file: {name[:100]}")
        media_type = MEDIA_TYPES[PurePath(name).suffix]
        return Response(contents[name], headers=PAGE_HEADERS, media_type=media_type)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return page(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return page("icon.svg")
