"""What goes wrong, in the shape and with the statuses that OpenAI's API uses; never 422."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from openpalm.errors import OpenPalmError, RequestError
from openpalm.serve.worker import EngineFailed, Overloaded, ShuttingDown

RETRY_AFTER_S = 1
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# What a field may be, where the validator's own words would list every alternative.
_SHAPES = {
    "prompt": "must be a string, a list of strings, of token ids, or of lists of token ids",
    "stop": "must be a string or a list of at most 16 strings",
    "content": "must be a string or a list of text parts",
    "role": "must be system, developer, user or assistant",
    "sequences": "must be a list of strings or of lists of token ids",
}


class ApiError(Exception):
    """A request that is answered with a status and a message."""

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
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    # A message may quote what no UTF-8 can hold.
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if error.status == 408:  # the rest of the body may still come
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error.status, error.message, error.param, error.code)
    return JSONResponse(body, error.status, headers)


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong: also a panic in a library, which is no Exception."""
    ends = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
    return not isinstance(error, ends)


def as_api_error(error: BaseException) -> ApiError:
    """What the caller is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        message = "all slots and the queue are full; try again in a moment"
        return ApiError(429, message, code="overloaded")
    if isinstance(error, ShuttingDown):
        return ApiError(503, "the server is shutting down; ask another one", code="draining")
    if isinstance(error, EngineFailed):
        return ApiError(503, f"generation failed ({error}); try again", code="engine_failed")
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, OpenPalmError):  # of the model, whatever was asked
        return ApiError(503, str(error), code="model_failed")
    # Never 500: what is no fault of the caller is 503 in this API.
    message = f"{type(error).__name__}: a bug of the server; see its log"
    return ApiError(503, message, code="internal_error")


def install(app: FastAPI) -> None:
    """Answers every error of `app` in that shape."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        response = error_response(as_api_error(error))
        response.headers.update(getattr(error, "headers", None) or {})  # Allow, of a 405
        return response

    kinds = (ApiError, Overloaded, ShuttingDown, EngineFailed, OpenPalmError)
    for kind in (*kinds, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(errors: Any) -> ApiError:
    """The first fault, by the name of its field."""
    first = errors[0]
    path = _own_path(first["loc"][1:])
    name = ".".join(map(str, path)) or "body"
    if path and path[-1] in _SHAPES:
        return ApiError(400, f"{name}: {_SHAPES[path[-1]]}", param=name)
    given = first.get("input")
    said = f"; it is {given}" if isinstance(given, int | float) and _short(given) else ""
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return ApiError(400, f"{name}: {message}{said}", param=name)


def _own_path(path: Sequence[Any]) -> list[Any]:
    """The caller's part of a validator's path: after such a field it names its alternatives."""
    own: list[Any] = []
    for part in path:
        own.append(part)
        if part in _SHAPES:
            break
    return own


def _short(number: float) -> bool:
    return math.isfinite(number) and abs(number) < 1e20
