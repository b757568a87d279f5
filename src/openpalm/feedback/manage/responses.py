"""Pages of judgements: the list with filters, deletion with its lineage, flags to resolve."""

from collections.abc import Sequence
from typing import Any

from django.contrib import messages
from django.db import connection
from django.db.models import QuerySet
from django.http import Http404, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.words import describe
from openpalm.feedback.manage.pages import find, open_flags, page
from openpalm.feedback.models import ModelVersion, Response, Role, Snapshot, User
from openpalm.feedback.paging import name_in, page_of
from openpalm.feedback.training.lineage import models_of

COMMON = ("submitted", "person", "compare", "rank", "rate", "thumb", "edit", "write")
KINDS = ("compare", "rank", "rate", "thumb", "edit", "write", "skip", "flag")

FILTERS: dict[str, tuple[str, Sequence[str]]] = {
    "state": ("state", Response.State.values),
    "by": ("author_kind", User.Kind.values),
    "kind": ("kind", KINDS),
}


@require_GET
@project_page(Role.REVIEWER)
def responses(request: ProjectRequest) -> HttpResponse:
    rows = _filtered(request).select_related("user", "item__prompt")
    listed = page_of(rows, request)
    return page(
        request,
        "responses",
        page=listed,
        rows=_shown(listed.rows, request.user),
        kinds=KINDS,
        states=Response.State.values,
        author_kinds=User.Kind.values,
        chosen={name: request.GET.get(name, "") for name in ("who", "kind", "state", "by")},
    )


def _filtered(request: ProjectRequest) -> "QuerySet[Response]":
    rows, given = Response.objects.filter(project=request.project), request.GET
    chosen = [
        (column, given[name], allowed)
        for name, (column, allowed) in FILTERS.items()
        if given.get(name) in allowed
    ]
    # PostgreSQL knows which values are rare, and joins indexes. In SQLite one index serves one
    # filter, and it would guess which: the labeler, else the first that is rare. The others are
    # written such that no index fits.
    guesses, has_index = connection.vendor == "sqlite", False
    if who := name_in(request):
        if not (user := User.objects.filter(username=who).first()):
            return rows.none()
        rows, has_index = rows.filter(user=user), True
    chosen.sort(key=lambda each: each[1] in COMMON)
    for column, value, allowed in chosen:
        if has_index and guesses:
            rows = rows.exclude(**{f"{column}__in": [v for v in allowed if v != value]})
        else:
            rows, has_index = rows.filter(**{column: value}), True
    return rows


def _shown(rows: list[Response], user: User) -> list[tuple[Response, str | None]]:
    """Each with its description; None if the viewer must not see it yet."""
    visible = revealed({row.item_id: row.item for row in rows}.values(), user)
    return [
        (row, describe(row) if row.item_id in visible or row.user_id == user.pk else None)
        for row in rows
    ]


def _find(request: ProjectRequest, response_id: int) -> Response:
    return find(Response.objects.select_related("user", "item__prompt"), response_id, request)


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def response_delete(request: ProjectRequest, response_id: int) -> HttpResponse:
    """Shows which models a judgement is in; a POST erases its content."""
    response = _find(request, response_id)
    if request.method == "POST":
        erase(response, request.user)
        messages.success(request, "The judgement is deleted: its content is erased.")
        return redirect("response-delete", request.project.slug, response.pk)
    is_visible = response.item_id in revealed([response.item], request.user)
    context: dict[str, Any] = {
        "response": response,
        "words": describe(response) if is_visible else None,
        "models": models_of([response]),
        "snapshots": Snapshot.objects.filter(rows__response=response),
        "is_deleted": response.state == Response.State.DELETED,
    }
    return page(request, "response_delete", **context)


def erase(response: Response, by: User) -> list[ModelVersion]:
    """Erases a judgement's content; returns the models trained on it. Idempotent."""
    models = models_of([response])
    if response.state != Response.State.DELETED:
        submission.delete(response.pk)
        audit.record(
            "judgement.deleted",
            user=by,
            project=response.project,
            target=response.uid,
            author=response.user.username,
            item=response.item_id,
            models=[model.name for model in models],
        )
    return models


@require_GET
@project_page(Role.ADMIN)
def flags(request: ProjectRequest) -> HttpResponse:
    """The unresolved flags."""
    rows = open_flags(request.project).select_related("user", "item__prompt")
    return page(request, "flags", page=page_of(rows, request))


@require_POST
@project_page(Role.ADMIN)
def flag_resolve(request: ProjectRequest, response_id: int) -> HttpResponse:
    response = _find(request, response_id)
    if response.state != Response.State.FLAGGED:
        raise Http404("this judgement is not a flag")
    if response.in_force:
        response.in_force = False
        response.save(update_fields=["in_force"])
        audit.record_for(
            request,
            "flag.resolved",
            target=f"item {response.item_id}",
            reason=response.reason[:500],
        )
    return redirect("flags", request.project.slug)
