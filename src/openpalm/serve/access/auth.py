"""Checks API keys, the admin key and the Host header of every request."""

import hmac
import re
from collections.abc import Sequence
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from openpalm.serve.access.body import discard_body
from openpalm.serve.api.error_responses import ApiError, error_response

LIVENESS_PATH = "/health"
"""Open to every caller under every host name: a health check may use the machine's address."""
PATHS_WITHOUT_KEY = frozenset({"/", "/ready", "/metrics", "/openapi.json", "/favicon.ico"})
"""Paths that need no key; /static/ needs none either."""
ADMIN_PATHS = ("/admin/", "/v1/score")
LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


class AuthMiddleware:
    """ASGI middleware that answers 401 to callers without the right key.

    Without `keys` every caller is accepted, but only under a local host name: this refuses web
    pages that point their own domain name at this machine (DNS rebinding). Without `admin_keys`
    the admin endpoints are closed to everyone.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], admin_keys: Sequence[str]):
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                with suppress(ClientDisconnect):
                    await discard_body(scope, receive)
                    await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        if path == LIVENESS_PATH:
            return
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if not self._keys and host not in LOCAL_HOSTS:
            raise ApiError(401, f"host {host[:100]}: without an API key only localhost is answered")
        # A preflight request of CORS (OPTIONS) carries no key.
        if path in PATHS_WITHOUT_KEY or path.startswith("/static/") or scope["method"] == "OPTIONS":
            return
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        key = authorization[7:].strip() if authorization[:7].lower() == "bearer " else ""
        if _is_one_of(key, self._admin_keys):
            return
        if path.startswith(ADMIN_PATHS):
            raise ApiError(401, _ADMIN_HELP if self._admin_keys else _NO_ADMIN, code="admin_key")
        if self._keys and not _is_one_of(key, self._keys):
            state = "wrong" if key else "missing"
            message = f"the API key is {state}; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")


_ADMIN_HELP = "this endpoint needs the admin key; send it as `Authorization: Bearer KEY`"
_NO_ADMIN = "this endpoint needs an admin key; start the server with --admin-key"


def _is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Compares in constant time: response times reveal nothing about a key."""
    return any(hmac.compare_digest(key.encode(), known.encode()) for known in keys)
