"""Errors in the shape and with the statuses of OpenAI's API; never 422 or 500."""

import asyncio
import math
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openpalm.errors import OpenPalmError, RequestError
from openpalm.serve.api.response_models import Error
from openpalm.serve.worker import EngineFailed, Overloaded, ShuttingDown

RETRY_AFTER_S = 1
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# Fields that take several types: pydantic's message would list each alternative.
_FIELD_HELP = {
    "prompt": "must be a string, a list of strings, of token ids, or of lists of token ids",
    "stop": "must be a string or a list of at most 16 strings",
    "content": "must be a string or a list of text parts",
    "role": "must be system, developer, user or assistant",
    "sequences": "must be a list of strings or of lists of token ids",
}


class ApiError(Exception):
    """A request that is answered with an error status and a message."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Error:
    """OpenAI's error object."""
    type_ = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # A message may quote a lone surrogate, which UTF-8 cannot encode.
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if error.status == 408:  # the rest of the body may still arrive
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.status, error.message, error.param, error.code)
    return JSONResponse(body, error.status, headers)


def is_failure(error: BaseException) -> bool:
    """Whether this is an error, panics of libraries included (they are not Exceptions).

    The other BaseExceptions end a task, a generator or the process on purpose.
    """
    ends = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
    return not isinstance(error, ends)


def as_api_error(error: BaseException) -> ApiError:
    """The status and message that the caller gets for an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        message = "the server is overloaded: its queue is full; try again in a moment"
        return ApiError(429, message, code="overloaded")
    if isinstance(error, ShuttingDown):
        message = "the server is shutting down; send the request to another server"
        return ApiError(503, message, code="draining")
    if isinstance(error, EngineFailed):
        return ApiError(503, f"generation failed ({error}); try again", code="engine_failed")
    if isinstance(error, RequestValidationError):
        return _validation_error(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, OpenPalmError):  # the model's failure, not the request's
        return ApiError(503, str(error), code="model_failed")
    # Not 500: clients retry a 503, and the next request may succeed.
    message = f"{type(error).__name__}: a bug in the server; see its log"
    return ApiError(503, message, code="internal_error")


def install(app: FastAPI) -> None:
    """Makes `app` answer every error in that shape."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        response = error_response(as_api_error(error))
        response.headers.update(getattr(error, "headers", None) or {})  # Allow, of a 405
        return response

    kinds = (ApiError, Overloaded, ShuttingDown, EngineFailed, OpenPalmError)
    for kind in (*kinds, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


class CatchAllMiddleware:
    """ASGI middleware that answers errors that the application's handlers cannot catch.

    Those are panics: FastAPI's handlers catch Exceptions only.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except BaseException as error:
            if started or not is_failure(error) or scope["type"] != "http":
                raise
            traceback.print_exc()
            await error_response(as_api_error(error))(scope, receive, send)


def _validation_error(errors: Any) -> ApiError:
    """The first error, under the name of its field."""
    first = errors[0]
    path = _field_path(first["loc"][1:])
    name = ".".join(map(str, path)) or "body"
    if path and path[-1] in _FIELD_HELP:
        return ApiError(400, f"{name}: {_FIELD_HELP[path[-1]]}", param=name)
    value = first.get("input")
    found = f"; it is {value}" if isinstance(value, int | float) and _is_short(value) else ""
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return ApiError(400, f"{name}: {message}{found}", param=name)


def _field_path(path: Sequence[Any]) -> list[Any]:
    """A pydantic location without the alternatives of a type that follow the field's name."""
    field_path: list[Any] = []
    for name in path:
        field_path.append(name)
        if name in _FIELD_HELP:
            break
    return field_path


def _is_short(number: float) -> bool:
    return math.isfinite(number) and abs(number) < 1e20
