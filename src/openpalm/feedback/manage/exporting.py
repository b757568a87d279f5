"""The export page: judgements in every format, streamed."""

from datetime import datetime, time
from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse, StreamingHttpResponse
from django.utils import timezone
from django.utils.dateparse import parse_date
from django.views.decorators.http import require_GET

from openpalm.data.rows.exports.formats import FORMATS
from openpalm.data.rows.exports.stream import EXPORT_NAMES, TABLE, export_lines
from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.judgements.records import in_pieces, project_records
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Item, Project, Response, Role, User
from openpalm.feedback.paging import name_in

TABLE_TITLE = "a table for spreadsheets, one judgement a line"
STATES = (Response.State.SUBMITTED, Response.State.FLAGGED)


@require_GET
@project_page(Role.ADMIN)
def export(request: ProjectRequest) -> HttpResponse:
    formats = [(name, known.title) for name, known in FORMATS.items()] + [(TABLE, TABLE_TITLE)]
    return page(
        request,
        "export",
        formats=formats,
        kinds=User.Kind.values,
        purposes=Item.Purpose.values,
        chosen=request.GET,
    )


@require_GET
@project_page(Role.ADMIN)
def download(request: ProjectRequest) -> HttpResponse:
    """The file, written while it is sent: memory does not grow with the project."""
    name = request.GET.get("format", "")
    if name not in EXPORT_NAMES:
        return HttpResponse("format: choose one of the list\n", "text/plain", status=422)
    try:
        rows, filters = _chosen(request)
    except DataError as error:
        return HttpResponse(f"{error}\n", "text/plain; charset=utf-8", status=422)
    audit.record(
        "export.downloaded", user=request.user, project=request.project, target=name, **filters
    )
    return file_of(request.project, name, rows)


def file_of(project: Project, name: str, rows: "QuerySet[Response] | None" = None) -> Any:
    """The project's judgements, or these, in the format `name`, as a file to save."""
    lines = in_pieces(export_lines(project_records(project, rows), name))
    is_table = name == TABLE
    kind = "text/csv; charset=utf-8" if is_table else "application/x-ndjson"
    suffix = "csv" if is_table else "jsonl"
    stream = StreamingHttpResponse(lines, content_type=kind)
    return attachment(stream, f"{project.slug}-{name}.{suffix}")


def _chosen(request: ProjectRequest) -> "tuple[QuerySet[Response], dict[str, Any]]":
    """The judgements in force that the filters leave, and the filters. Raises DataError."""
    rows = Response.objects.filter(project=request.project)
    given, filters = request.GET, {}
    if by := [kind for kind in given.getlist("by") if kind in User.Kind.values]:
        rows, filters["by"] = rows.filter(author_kind__in=by), by
    if who := name_in(request):
        rows, filters["who"] = rows.filter(user__username=who), who
    if (purpose := given.get("purpose")) in Item.Purpose.values:
        rows, filters["purpose"] = rows.filter(item__purpose=purpose), purpose
    state = given.get("state", Response.State.SUBMITTED)
    if state in STATES:
        rows, filters["state"] = rows.filter(state=state), state
    if since := given.get("since"):
        rows, filters["since"] = rows.filter(created_at__gte=_day(since)), since
    return rows, filters


def _day(text: str) -> datetime:
    try:
        day = parse_date(text)
    except ValueError:
        day = None
    if day is None:
        raise DataError(f"since: {text[:40]!a} is no day; write it as 2026-01-31")
    return timezone.make_aware(datetime.combine(day, time.min))


def attachment(response: Any, name: str) -> Any:
    """The answer as a file to save, under a name without characters of a header."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name if c.isascii())
    response.headers["Content-Disposition"] = f'attachment; filename="{safe}"'
    return response
