"""Middleware: content security policy, size limit, NUL check, redirect to the first sign-up."""

import re
from collections.abc import Callable

from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect

from openpalm.feedback.accounts.errors import bad_request, too_large
from openpalm.feedback.models import User

# No inline script or style, nothing from another origin.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

UPLOAD = re.compile(r"/p/[a-z0-9-]+/prompts/upload")
FORM_BYTES = 2**16
"""for the fields of a form, in addition to its file"""
Next = Callable[[HttpRequest], HttpResponse]


def content_security_policy(get_response: Next) -> Next:
    def respond(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        if not request.path.startswith("/static/"):
            response.headers.setdefault("Cache-Control", "no-store")
        return response

    return respond


def body_limit(get_response: Next) -> Next:
    """Refuses large bodies before anything reads them: a multipart body is stored while it is read.

    Only the upload page takes a file, and only from a signed-in user. (The JSON of the API
    has its own limit, DATA_UPLOAD_MAX_MEMORY_SIZE.)
    """
    small = settings.DATA_UPLOAD_MAX_MEMORY_SIZE + FORM_BYTES

    def respond(request: HttpRequest) -> HttpResponse:
        if (size := _length(request)) > small:
            limit = settings.FEEDBACK_MAX_UPLOAD_BYTES + FORM_BYTES
            may = UPLOAD.fullmatch(request.path) and request.user.is_authenticated
            if size > limit or not may:
                return too_large(request)
        return get_response(request)

    return respond


def _length(request: HttpRequest) -> int:
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0)
    except ValueError:
        return 0


def no_nul(get_response: Next) -> Next:
    """Refuses forms that contain NUL, which PostgreSQL cannot store.

    (The API reads its own bodies and refuses it there.)
    """

    def respond(request: HttpRequest) -> HttpResponse:
        if request.method == "POST" and not request.path.startswith("/api/"):
            fields = request.POST.lists()
            if any("\0" in text for name, values in fields for text in (name, *values)):
                return bad_request(request)
        return get_response(request)

    return respond


def first_admin(get_response: Next) -> Next:
    """Sends everybody to /setup until the first administrator has signed up."""
    is_set_up = False

    def respond(request: HttpRequest) -> HttpResponse:
        nonlocal is_set_up
        if not is_set_up and request.path not in ("/setup", "/healthz"):
            is_set_up = User.objects.filter(is_superuser=True).exists()
            if not is_set_up and not request.path.startswith("/api/"):
                return redirect("setup")
        return get_response(request)

    return respond
