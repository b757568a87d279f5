"""The pages of errors."""

import logging
import sys
from typing import Any

from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.loader import render_to_string

from openpalm.base.files import is_disk_full

TEMPLATE = "feedback/error.html"
RETRY_AFTER_S = "10"


def bad_request(request: HttpRequest, exception: Any = None) -> HttpResponse:
    return _without_request(400, "The server cannot read this request.")


def forbidden(request: HttpRequest, exception: Any = None) -> HttpResponse:
    return _page(request, 403, str(exception) or "You may not open this page.")


def not_found(request: HttpRequest, exception: Any = None) -> HttpResponse:
    # The text of a Resolver404 is a list of URL patterns, not a reason.
    known = type(exception) is Http404 and exception.args
    return _page(request, 404, str(exception) if known else "There is no such page.")


def too_large(request: HttpRequest) -> HttpResponse:
    return _without_request(413, "This request is too large for the site.")


def server_error(request: HttpRequest) -> HttpResponse:
    if reason := database_trouble(sys.exc_info()[1]):
        response = _without_request(503, f"{reason}. Go back: what you wrote is still there.")
        response["Retry-After"] = RETRY_AFTER_S
        return response
    return _without_request(500, "The server failed. The error is in its log; nothing was stored.")


def database_trouble(error: BaseException | None) -> str:
    """What to say if database or disk cannot be reached or written for a while; empty otherwise."""
    is_full = is_disk_full(error)
    if not is_full and not isinstance(error, (OperationalError, InterfaceError)):
        return ""
    text = str(error).lower()
    if is_full or "is full" in text or "no space" in text:
        cause = "The disk of this site is full"
    elif "readonly" in text or "read-only" in text:
        cause = "The database of this site cannot be written"
    else:
        cause = "The database of this site does not answer"
    return f"{cause}: nothing was stored. Try again in a minute, or tell its administrator"


class OneLine(logging.Filter):
    """In the log such a trouble is one line too: its traceback says nothing of its cause."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if database_trouble(error):
            reason = " ".join(str(error).split())
            record.msg, record.args = f"{record.getMessage()}: {reason}", ()
            record.exc_info = record.exc_text = None
        return True


def sentence(error: Exception) -> str:
    """The message of an error as a sentence of a page."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    return _page(
        request,
        403,
        "This form is out of date, or it came from another site. Go back, load the page again and "
        "send it again. Cookies must be enabled.",
    )


def _page(request: HttpRequest, status: int, reason: str) -> HttpResponse:
    return render(request, TEMPLATE, {"status": status, "reason": reason}, status=status)


def _without_request(status: int, reason: str) -> HttpResponse:
    """A page that reads neither the session nor the database: they may be what failed."""
    return HttpResponse(
        render_to_string(TEMPLATE, {"status": status, "reason": reason}), status=status
    )
