"""Pagination of long lists by id, and the filters in a page's URL.

The cost of a page does not grow with its number.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.db.models import QuerySet
from django.http import HttpRequest

PAGE_SIZE = 50
MAX_ID = 2**63 - 1


@dataclass(frozen=True)
class Page:
    """Rows, newest first, and the queries ("before=12&state=open") of both neighbours."""

    rows: list[Any]
    newer: str | None
    older: str | None


def page_of(rows: "QuerySet[Any]", request: HttpRequest, size: int = PAGE_SIZE) -> Page:
    """The page that `before` or `after` (an id) in the address asks for; else the first."""
    before, after = _place(request)
    if after is not None:
        found = list(rows.filter(pk__gt=after).order_by("pk")[: size + 1])
        has_newer, has_older = len(found) > size, True
        found = found[:size][::-1]
    else:
        older = rows if before is None else rows.filter(pk__lt=before)
        found = list(older.order_by("-pk")[: size + 1])
        has_newer, has_older = before is not None, len(found) > size
        found = found[:size]
    if not found:
        return Page([], _query(request) if before or after else None, None)
    return Page(
        found,
        _query(request, after=found[0].pk) if has_newer else None,
        _query(request, before=found[-1].pk) if has_older else None,
    )


def within(rows: "QuerySet[Any]", request: HttpRequest, column: str) -> "QuerySet[Any]":
    """Keeps the rows that refer, by `column`, to the id range of the page."""
    before, after = _place(request)
    if after is not None:
        return rows.filter(**{f"{column}__gt": after})
    return rows if before is None else rows.filter(**{f"{column}__lt": before})


def _query(request: HttpRequest, **place: int) -> str:
    filters = {k: v for k, v in request.GET.items() if k not in ("before", "after") and v}
    return urlencode(filters | place)


def _place(request: HttpRequest) -> tuple[int | None, int | None]:
    return id_of(request.GET.get("before", "")), id_of(request.GET.get("after", ""))


def id_of(text: str) -> int | None:
    """The id in a visitor's text; None if no row can have it."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_ID))
    return min(int(text), MAX_ID) if is_number else None


def name_in(request: HttpRequest) -> str:
    """The user name of the filter `who`; empty without one."""
    # The NUL check is for forms only, and PostgreSQL cannot compare NUL.
    return request.GET.get("who", "").replace("\0", "").strip()
