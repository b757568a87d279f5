"""Secrets of API tokens and links: made once, shown once, stored as a hash."""

import hashlib
import secrets
from collections.abc import Iterable
from datetime import datetime

from openpalm.feedback.models import ApiToken, Project, User

MARK = "opf_"
"""lets secret scanners find a token that was published by mistake"""


def issue(
    user: User,
    name: str,
    scopes: Iterable[str],
    *,
    project: Project | None = None,
    expires_at: datetime | None = None,
) -> str:
    """Makes a token and returns its text, which is not stored."""
    chosen = sorted(set(scopes))
    if unknown := set(chosen) - set(ApiToken.SCOPES):
        raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
    text = MARK + secrets.token_urlsafe(32)
    ApiToken.objects.create(
        user=user,
        project=project,
        name=name,
        prefix=text[:12],
        digest=digest_of(text),
        scopes=chosen,
        expires_at=expires_at,
    )
    return text


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
