"""The one shape of the API's errors: {"error": {"code", "message", "field"}}."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from django.http import JsonResponse

from openpalm.errors import DataError

CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    429: "too_many_failures",
    500: "internal",
    503: "unavailable",
}


@contextmanager
def refusals() -> Iterator[None]:
    """Turns a DataError about the state of the project into status 409, with the same message."""
    try:
        yield
    except DataError as error:
        raise ApiError(409, f"{error}") from None


class ApiError(Exception):
    """A request that cannot be answered; `field` names what is wrong in it."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.headers = headers or {}

    def response(self) -> JsonResponse:
        code = CODES.get(self.status, HTTPStatus(self.status).phrase.lower().replace(" ", "_"))
        error = {"code": code, "message": self.message, "field": self.field}
        return JsonResponse({"error": error}, status=self.status, headers=self.headers)
