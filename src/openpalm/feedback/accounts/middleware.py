"""The content security policy of every page, and the way to the first administrator."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect

from openpalm.feedback.models import User

# No script and no style in the page itself, nothing from another origin.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

Next = Callable[[HttpRequest], HttpResponse]


def content_security_policy(get_response: Next) -> Next:
    def respond(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        if not request.path.startswith("/static/"):
            response.headers.setdefault("Cache-Control", "no-store")
        return response

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
