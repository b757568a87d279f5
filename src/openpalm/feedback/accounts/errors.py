"""The pages of errors."""

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string

TEMPLATE = "feedback/error.html"


def bad_request(request: HttpRequest, exception: Any = None) -> HttpResponse:
    return _without_request(400, "The server cannot read this request.")


def forbidden(request: HttpRequest, exception: Any = None) -> HttpResponse:
    return _page(request, 403, str(exception) or "You may not open this page.")


def not_found(request: HttpRequest, exception: Any = None) -> HttpResponse:
    # The text of a Resolver404 is a list of URL patterns, not a reason.
    known = type(exception) is Http404 and exception.args
    return _page(request, 404, str(exception) if known else "There is no such page.")


def too_large(request: HttpRequest) -> HttpResponse:
    return _without_request(413, "This is larger than the site takes.")


def server_error(request: HttpRequest) -> HttpResponse:
    return _without_request(500, "The server failed. The error is in its log; nothing was stored.")


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    return _page(
        request,
        403,
        "This form is out of date, or it came from another site. Go back, load the page again and "
        "send it once more. Cookies must be allowed.",
    )


def _page(request: HttpRequest, status: int, reason: str) -> HttpResponse:
    return render(request, TEMPLATE, {"status": status, "reason": reason}, status=status)


def _without_request(status: int, reason: str) -> HttpResponse:
    """A page that reads neither the session nor the database: they may be what failed."""
    return HttpResponse(
        render_to_string(TEMPLATE, {"status": status, "reason": reason}), status=status
    )
