"""The audit log: filtered, by page, and as a file."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from openpalm.data.rows.exports.judgement_table import defuse
from openpalm.feedback.accounts.access import ProjectRequest, project_page, site_admin_page
from openpalm.feedback.manage.exporting import attachment
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Event, Role, User
from openpalm.feedback.paging import name_in, page_of

AREAS = (
    *("account", "comparison", "export", "flag", "guideline", "import", "invitation", "item"),
    *("job", "judgement", "labeler", "member", "model", "project", "prompt", "site", "table"),
    *("token", "training"),
)
"""what comes before the dot in the name of an action"""
COLUMNS = ("id", "time", "user", "action", "target", "data")
CHUNK = 1000


@require_GET
@project_page(Role.ADMIN)
def audit_page(request: ProjectRequest) -> HttpResponse:
    events = Event.objects.filter(project=request.project)
    if request.GET.get("format") == "csv":
        return _download(request, events, f"{request.project.slug}-audit.csv")
    return page(request, "audit", **_listed(request, events))


@require_GET
@site_admin_page
def site_audit(request: HttpRequest) -> HttpResponse:
    """Every event of the site."""
    if request.GET.get("format") == "csv":
        return _download(request, Event.objects.all(), "audit.csv")
    context = _listed(request, Event.objects.all()) | {"is_site": True}
    return render(request, "feedback/manage/audit.html", context)


def _listed(request: HttpRequest, events: "QuerySet[Event]") -> dict[str, Any]:
    # Not joined: SQLite would begin with the project and sort all of its events.
    shown = _filtered(request, events).prefetch_related("user", "project")
    return {
        "page": page_of(shown, request),
        "areas": AREAS,
        "area": request.GET.get("area", ""),
        "who": name_in(request),
    }


def _filtered(request: HttpRequest, events: "QuerySet[Event]") -> "QuerySet[Event]":
    if (area := request.GET.get("area")) in AREAS:
        events = events.filter(action__startswith=f"{area}.")
    if who := name_in(request):
        events = events.filter(user=User.objects.filter(username=who).first() or 0)
    return events


def _download(request: HttpRequest, events: "QuerySet[Event]", name: str) -> HttpResponse:
    lines = _lines(_filtered(request, events).select_related("user"))
    return attachment(StreamingHttpResponse(lines, content_type="text/csv; charset=utf-8"), name)


def _lines(events: "QuerySet[Event]") -> Iterator[bytes]:
    yield _csv_line(COLUMNS)
    for event in events.order_by("id").iterator(chunk_size=CHUNK):
        user = event.user.username if event.user else ""
        data = json.dumps(event.data, ensure_ascii=False)
        when = event.created_at.isoformat()
        yield _csv_line((event.pk, when, user, event.action, event.target, data))


def _csv_line(cells: tuple[Any, ...]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerow([defuse(str(cell)) for cell in cells])
    return stream.getvalue().encode()
