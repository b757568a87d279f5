"""Streams preference records to files of any export format, in memory that does not grow.

Records are read one by one and written one by one. The caller leaves out replaced records.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from openpalm.base.console import shown
from openpalm.base.files import atomic_file
from openpalm.data.rows.exports.formats import FORMATS, RECORDS, Altered, Fields, Format, Made
from openpalm.data.rows.exports.judgement_table import table_header, table_line
from openpalm.data.rows.preferences import Preference, rating_group
from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError, StorageError

TABLE = "csv"
EXPORT_NAMES = (*FORMATS, TABLE)
MAX_GROUP = 64
"""Ratings of one prompt by one author that are compared: n of them give n * (n - 1) / 2 pairs."""


def export_rows(
    records: Iterable[Preference], name: str, counts: StreamCounts | None = None
) -> Iterator[Fields]:
    """The rows of a format in FORMATS for records in force.

    Pairs and scores of ratings need the ratings of one prompt by one author next to each other:
    sort the records by prompt and author. `counts` receives what gives no row. Raises DataError for
    an unknown name.
    """
    made = FORMATS.get(name)
    if made is None:
        raise DataError(f"format {shown(name)}: must be one of {', '.join(EXPORT_NAMES)}")
    return _rows(records, name, made, counts if counts is not None else StreamCounts())


def export_lines(
    records: Iterable[Preference], name: str, counts: StreamCounts | None = None
) -> Iterator[bytes]:
    """The same as lines of a file: .jsonl, or the CSV table if the name is `csv`."""
    counts = counts if counts is not None else StreamCounts()
    if name == TABLE:
        return _table_lines(records, counts)
    return (json.dumps(row).encode() + b"\n" for row in export_rows(records, name, counts))


def write_export(
    path: Path, records: Iterable[Preference], name: str, counts: StreamCounts | None = None
) -> StreamCounts:
    """Replaces the file, atomically. Raises StorageError."""
    counts = counts if counts is not None else StreamCounts()
    lines = export_lines(records, name, counts)
    try:
        with atomic_file(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None
    return counts


def _rows(
    records: Iterable[Preference], name: str, made: Format, counts: StreamCounts
) -> Iterator[Fields]:
    for group, row in _made(records, made, counts):
        if isinstance(row, str):
            counts.leave_out(group[0].id, row)
            continue
        if isinstance(row, Altered):
            counts.alter(group[0].id, row.change)
            row = row.row
        counts.used += 1
        if name != RECORDS:
            row |= {"record_ids": [p.id for p in group], "author_kind": group[0].author_kind}
        yield row


def _made(
    records: Iterable[Preference], made: Format, counts: StreamCounts
) -> Iterator[tuple[list[Preference], Made]]:
    """(the records that a row comes from, the row or the reason why there is none)."""
    for key, run in groupby(records, lambda p: _run_key(p, made)):
        if key is None or made.of_ratings is None:
            for p in run:
                yield from (([p], row) for row in made.of_one(p))
            continue
        group: list[Preference] = []
        for p in run:
            if len(group) == MAX_GROUP:
                counts.leave_out(p.id, f"more than {MAX_GROUP} ratings of one prompt by one author")
            else:
                group.append(p)
        yield from made.of_ratings(group)


def _run_key(p: Preference, made: Format) -> object:
    """Adjacent ratings with equal keys are compared; None for all other records."""
    return rating_group(p) if p.kind == "rate" and made.of_ratings else None


def _table_lines(records: Iterable[Preference], counts: StreamCounts) -> Iterator[bytes]:
    yield table_header()
    for p in records:
        counts.used += 1
        yield table_line(p)
