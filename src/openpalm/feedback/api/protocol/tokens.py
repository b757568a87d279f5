"""Bearer tokens: made once, stored as a hash, limited to scopes and to a project.

A token has 256 random bits, so it cannot be guessed; failures are throttled to keep their cost low.
A valid token is never refused because of the failures of others at its address.
"""

from datetime import timedelta

from django.db.models import Q
from django.http import HttpRequest
from django.utils import timezone

from openpalm.feedback.accounts.throttle import NOT_COUNTED, WINDOW, address_of
from openpalm.feedback.accounts.tokens import digest_of
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.models import ApiToken, LoginFailure

FAILURES = 20
"""wrong tokens from an address within the WINDOW"""
USED_AT_MOST_EVERY = timedelta(minutes=1)


def authenticate(request: HttpRequest) -> ApiToken:
    """The token of the Authorization header. Raises ApiError 401 or 429."""
    kind, _, text = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() != "bearer" or not text.strip():
        raise _refused("send `Authorization: Bearer TOKEN`")
    token = _valid(text.strip())
    if token is None:
        _count_failure(request)
        raise _refused("this token is unknown, revoked or expired")
    _note_use(token)
    return token


def _valid(text: str) -> ApiToken | None:
    now = timezone.now()
    live = Q(expires_at=None) | Q(expires_at__gt=now)
    tokens = ApiToken.objects.select_related("user", "project").filter(
        live, digest=digest_of(text), revoked_at=None, user__is_active=True
    )
    return tokens.first()


def _note_use(token: ApiToken) -> None:
    now = timezone.now()
    if token.last_used_at is None or now - token.last_used_at > USED_AT_MOST_EVERY:
        ApiToken.objects.filter(pk=token.pk).update(last_used_at=now)


def _count_failure(request: HttpRequest) -> None:
    """Raises ApiError 429 after FAILURES in the WINDOW from this address."""
    since = timezone.now() - WINDOW
    address = address_of(request)
    failures = LoginFailure.objects.filter(
        name=NOT_COUNTED, address=address, created_at__gt=since
    ).count()
    if failures >= FAILURES:
        seconds = int(WINDOW.total_seconds())
        headers = {"Retry-After": str(seconds)}
        raise ApiError(429, "too many requests with wrong tokens; wait", headers=headers)
    LoginFailure.objects.create(name=NOT_COUNTED, address=address)


def _refused(message: str) -> ApiError:
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
