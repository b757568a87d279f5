"""API tokens: made, shown once, looked up by hash, revoked."""

import hashlib
import secrets
from collections.abc import Iterable
from datetime import timedelta

from django.db.models import Q
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.models import ApiToken, Project, User

PREFIX = "opf_"
"""marks the tokens of this application, so that scanners of secrets recognise a leaked one"""
_SHOWN = 10


def digest_of(token: str) -> str:
    """A plain hash is enough: a token has 256 random bits, so it cannot be guessed from it."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_token(
    user: User,
    name: str,
    scopes: Iterable[str],
    *,
    project: Project | None = None,
    days: int | None = None,
) -> tuple[ApiToken, str]:
    """The row and the token itself, which is stored nowhere. Raises DataError."""
    scopes = sorted(set(scopes))
    if unknown := set(scopes) - set(ApiToken.SCOPES):
        raise DataError(f"scope {min(unknown)}: must be one of {', '.join(ApiToken.SCOPES)}")
    secret = PREFIX + secrets.token_urlsafe(32)
    row = ApiToken.objects.create(
        user=user,
        project=project,
        name=name,
        prefix=secret[:_SHOWN],
        digest=digest_of(secret),
        scopes=scopes,
        expires_at=None if days is None else timezone.now() + timedelta(days=days),
    )
    return row, secret


def find_token(secret: str) -> ApiToken | None:
    """The token in force with this secret, with its user."""
    in_force = Q(expires_at=None) | Q(expires_at__gt=timezone.now())
    found = ApiToken.objects.filter(
        in_force, digest=digest_of(secret), revoked_at=None, user__is_active=True
    )
    return found.select_related("user", "project").first()
