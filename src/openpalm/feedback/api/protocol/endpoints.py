"""Endpoints: an operation has a scope that its token needs and a role that its user needs.

A session is not accepted, so no page of another site can use the API with a visitor's cookies; this
is why the views are exempt from the CSRF check.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, JsonResponse
from django.http.response import HttpResponseBase
from django.views.decorators.csrf import csrf_exempt

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import RANKS, find_project, has_rank
from openpalm.feedback.accounts.errors import RETRY_AFTER_S, database_trouble
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.api.protocol.fields import body_of, query_of
from openpalm.feedback.api.protocol.tokens import authenticate
from openpalm.feedback.models import ApiToken, Project, User
from openpalm.feedback.paging import MAX_ID

logger = logging.getLogger(__name__)
MAX_PAGE = 500
Row = TypeVar("Row", bound=Model)


class Call:
    """A request with a valid token that has the operation's scope."""

    def __init__(self, request: HttpRequest, token: ApiToken, least: str):
        self.request = request
        self.token = token
        self.user: User = token.user
        self.least = least
        self.role = ""
        """of the user in the project; known once the project is entered"""
        self.query = query_of(request)
        self.body = body_of(request)

    def enter(self, slug: str) -> tuple[Project, str]:
        """The project and the user's role in it, which is the operation's least role or above."""
        try:
            project, role = find_project(self.user, slug)
        except Http404 as error:
            raise ApiError(404, f"{error}") from None
        if self.token.project_id not in (None, project.pk):
            raise ApiError(403, "this token is limited to another project")
        if not has_rank(role, self.least):
            raise ApiError(403, f"this needs the role {self.least} or above; yours is {role}")
        self.role = role
        return project, role

    def find(self, rows: "QuerySet[Row]", what: str) -> Row:
        """The first row, if the user may enter its project; else ApiError 404."""
        found: Any = rows.select_related("project").first()
        try:
            if found is not None:
                self.enter(found.project.slug)
                return found
        except ApiError as error:
            if error.status != 404:
                raise
        raise ApiError(404, f"there is no such {what}, or you may not see it")

    def project_in_query(self) -> tuple[Project, str]:
        return self.enter(self.query.text("project", most=60))

    def finish(self) -> None:
        """Refuses parameters and fields that were not read."""
        self.query.finish()
        self.body.finish()

    def page(self, rows: Any, to_json: Callable[[list[Any]], list[dict[str, Any]]]) -> JsonResponse:
        """One page of `rows` in the order of their ids; `next` is the `after` of the next page."""
        after = self.query.whole("after", 0, MAX_ID, 0)
        limit = self.query.whole("limit", 1, MAX_PAGE, 100)
        self.finish()
        found = list(rows.filter(pk__gt=after).order_by("pk")[: limit + 1])
        more = len(found) > limit
        page = found[:limit]
        return JsonResponse({"data": to_json(page), "next": page[-1].pk if more else None})


def each(to_json: Callable[[Any], dict[str, Any]]) -> Callable[[list[Any]], list[dict[str, Any]]]:
    """For `Call.page`: rows whose JSON needs no other row."""
    return lambda rows: [to_json(row) for row in rows]


Handler = Callable[..., HttpResponseBase]


@dataclass(frozen=True)
class Operation:
    """A handler, `handler(call, **names of the path)`, and who may call it."""

    handler: Handler
    scope: str
    least: str


def operation(scope: str, least: str) -> Callable[[Handler], Operation]:
    """Makes an operation of a handler."""
    assert scope in ApiToken.SCOPES, scope
    assert least in RANKS, least
    return lambda handler: Operation(handler, scope, least)


def endpoint(**operations: Operation) -> Any:
    """The view of a URL, with an operation for each HTTP method."""

    @csrf_exempt
    def view(request: HttpRequest, **path: Any) -> HttpResponseBase:
        try:
            return _answer(request, operations, path)
        except ApiError as error:
            return error.response()
        except DataError as error:
            return ApiError(400, f"{error}").response()
        except Exception as error:
            if reason := database_trouble(error):
                logger.error("%s %s: %s", request.method, request.path, error)
                return ApiError(503, reason, headers={"Retry-After": RETRY_AFTER_S}).response()
            logger.exception("%s %s", request.method, request.path)
            return ApiError(500, "the server failed; its log has the reason").response()

    scopes = sorted({one.scope for one in operations.values()})
    marked: Any = view
    marked.access = "api:" + ",".join(scopes)
    marked.operations = operations
    return marked


def _answer(
    request: HttpRequest, operations: dict[str, Operation], path: dict[str, Any]
) -> HttpResponseBase:
    wanted = operations.get(request.method or "")
    if wanted is None:
        allowed = ", ".join(operations)
        raise ApiError(405, f"use {allowed} here", headers={"Allow": allowed})
    token = authenticate(request)
    if wanted.scope not in token.scopes:
        raise ApiError(403, f"this token lacks the scope {wanted.scope}")
    return wanted.handler(Call(request, token, wanted.least), **path)
