"""The export page: judgements in every format, streamed."""

from collections.abc import Iterable, Iterator
from datetime import datetime, time
from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse, StreamingHttpResponse
from django.utils import timezone
from django.utils.dateparse import parse_date
from django.views.decorators.http import require_GET

from openpalm.data.rows.exports.formats import FORMATS
from openpalm.data.rows.exports.stream import EXPORT_NAMES, TABLE, export_lines
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.judgements.consensus import consensus_records
from openpalm.feedback.judgements.records import in_pieces, project_records
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Event, Item, Project, Response, Role, User
from openpalm.feedback.paging import name_in

TABLE_TITLE = "a table for spreadsheets, one judgement a line"
WRITTEN = "export.written"
RECENT_EVENTS, SHOWN = 100, 5
STATES = (Response.State.SUBMITTED, Response.State.FLAGGED)


@require_GET
@project_page(Role.ADMIN)
def export(request: ProjectRequest) -> HttpResponse:
    formats = [(name, known.title) for name, known in FORMATS.items()] + [(TABLE, TABLE_TITLE)]
    events = Event.objects.filter(project=request.project).select_related("user").order_by("-id")
    written = [event for event in events[:RECENT_EVENTS] if event.action == WRITTEN]
    return page(
        request,
        "export",
        formats=formats,
        kinds=User.Kind.values,
        purposes=Item.Purpose.values,
        chosen=request.GET,
        written=written[:SHOWN],
    )


@require_GET
@project_page(Role.ADMIN)
def download(request: ProjectRequest) -> HttpResponse:
    """Streams the file: memory does not grow with the project."""
    name = request.GET.get("format", "")
    if name not in EXPORT_NAMES:
        return HttpResponse("format: choose one of the list\n", "text/plain", status=422)
    try:
        rows, filters = _chosen(request)
    except DataError as error:
        return HttpResponse(f"{error}\n", "text/plain; charset=utf-8", status=422)
    audit.record_for(request, "export.downloaded", target=name, **filters)
    counts = StreamCounts()
    if request.GET.get("consensus"):
        records = consensus_records(request.project, counts, rows)
    else:
        records = project_records(request.project, rows)
    return _file(request.project, name, _counted(request, name, records, counts))


def _counted(
    request: ProjectRequest, name: str, records: Iterable[Preference], counts: StreamCounts
) -> Iterator[bytes]:
    """The lines. After the last one the audit log gets what the format could not hold.

    The file itself cannot say it: its first lines are sent before the last rows are read.
    """
    yield from export_lines(records, name, counts)
    left_out = dict(counts.unused)
    audit.record_for(request, WRITTEN, target=name, rows=counts.used, left_out=left_out)


def file_of(project: Project, name: str, *, is_consensus: bool) -> Any:
    """The project's judgements in the format `name`, or those of each item as one."""
    every = project_records(project)
    records = consensus_records(project, StreamCounts()) if is_consensus else every
    return _file(project, name, export_lines(records, name))


def _file(project: Project, name: str, lines: Iterable[bytes]) -> Any:
    lines = in_pieces(lines)
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
    if given.get("consensus"):
        filters["consensus"] = True
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
    """The response as a download, with a name that is safe in a header."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name if c.isascii())
    response.headers["Content-Disposition"] = f'attachment; filename="{safe}"'
    return response
