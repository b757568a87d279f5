"""The export page: judgements in every format, streamed."""

from datetime import datetime, time
from typing import Any

from django.http import HttpResponse, StreamingHttpResponse
from django.utils import timezone
from django.utils.dateparse import parse_date
from django.views.decorators.http import require_GET

from openpalm.data.rows.exports.formats import FORMATS
from openpalm.data.rows.exports.judgement_table import defuse
from openpalm.data.rows.exports.stream import TABLE, export_lines
from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.labeling.records import in_pieces, project_records
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Item, Response, Role, User

TABLE_TITLE = "a table for spreadsheets, one judgement a line"
STATES = (Response.State.SUBMITTED, Response.State.FLAGGED)
__all__ = ["attachment", "defuse", "download", "export"]


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
    if name != TABLE and name not in FORMATS:
        return HttpResponse("format: choose one of the list\n", "text/plain", status=422)
    try:
        rows, filters = _chosen(request)
    except DataError as error:
        return HttpResponse(f"{error}\n", "text/plain; charset=utf-8", status=422)
    audit.record(
        "export.downloaded", user=request.user, project=request.project, target=name, **filters
    )
    is_table = name == TABLE
    kind = "text/csv; charset=utf-8" if is_table else "application/x-ndjson"
    lines = in_pieces(export_lines(project_records(request.project, rows), name))
    stream = StreamingHttpResponse(lines, content_type=kind)
    suffix = "csv" if is_table else "jsonl"
    return attachment(stream, f"{request.project.slug}-{name}.{suffix}")


def _chosen(request: ProjectRequest) -> tuple[Any, dict[str, Any]]:
    """The judgements in force that the filters leave, and the filters. Raises DataError."""
    rows = Response.objects.filter(project=request.project)
    given, filters = request.GET, {}
    if by := [kind for kind in given.getlist("by") if kind in User.Kind.values]:
        rows, filters["by"] = rows.filter(author_kind__in=by), by
    if who := given.get("who", "").replace("\0", "").strip():
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
