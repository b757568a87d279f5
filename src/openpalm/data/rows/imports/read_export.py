"""Reads the exports of annotation tools, Argilla and Label Studio, as preference records.

A stream: one task at a time, in bounded memory. What gives no record is counted with its reason.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.base.console import names
from openpalm.data.corpus.json_lines import read_rows
from openpalm.data.corpus.json_objects import read_objects
from openpalm.data.rows.imports.argilla import is_argilla, parse_argilla
from openpalm.data.rows.imports.judgements import records_of
from openpalm.data.rows.imports.label_studio import (
    is_label_studio,
    is_label_studio_min,
    parse_label_studio,
    parse_label_studio_min,
)
from openpalm.data.rows.imports.task_fields import Content, find_content
from openpalm.data.rows.imports.tasks import Roles, Task
from openpalm.data.rows.messages import Messages
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.read_result import StreamCounts, UnusableRow
from openpalm.errors import DataError

Row = dict[str, Any]
_SUFFIXES = (".json", ".jsonl", ".ndjson")
_PACKED = (".gz", ".zst", ".xz")


class ImportedTask(NamedTuple):
    """A prompt with its completions, and what people judged of them (perhaps nothing yet)."""

    where: str
    prompt: Messages
    candidates: tuple[Candidate, ...]
    preferences: list[Preference]


class Tool(NamedTuple):
    name: str
    prefix: str
    """begins the ids of its records"""
    detect: Callable[[Row], bool]
    parse: Callable[[Row, Roles], tuple[Task, list[str]]]


_TOOLS = (
    Tool(
        "Label Studio", "label-studio", is_label_studio, lambda row, roles: parse_label_studio(row)
    ),
    Tool("Argilla", "argilla", is_argilla, lambda row, roles: parse_argilla(row)),
    Tool("Label Studio JSON-MIN", "label-studio", is_label_studio_min, parse_label_studio_min),
)


def find_tool(row: Row) -> Tool | None:
    """The tool that wrote this row of an export, or None."""
    return next((tool for tool in _TOOLS if tool.detect(row)), None)


def read_export(
    path: str | Path,
    roles: Roles | None = None,
    counts: StreamCounts | None = None,
    created: str | None = None,
) -> Iterator[ImportedTask]:
    """The tasks of a .json or .jsonl file, compressed or not, that Argilla or Label Studio wrote.

    `roles` names the prompt, the completions and the meaning of questions where their names do not
    say it. `counts` receives the number of records, and what gave none. `created` is the time of
    judgements that have none; by default now. A second reading of the file gives the same ids.
    Raises DataError with file, line or record, and field.
    """
    path = Path(path)
    roles, counts = roles or Roles(), counts if counts is not None else StreamCounts()
    created = created or datetime.now(UTC).isoformat(timespec="seconds")
    first: Tool | None = None
    for where, row in _read_file(path):
        tool = find_tool(row)
        if tool is None or (first and tool is not first):
            known = f"a row of {first.name}" if first else "an export of Argilla or Label Studio"
            raise DataError(f"{where}: its fields ({names(row)}) are not those of {known}")
        first = tool
        try:
            yield import_row(where, row, tool, roles, counts, created)
        except UnusableRow as error:
            counts.leave_out(where, error.reason)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if first is None:
        raise DataError(f"{path}: is empty; give an export of Argilla or Label Studio")


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    suffix = Path(path.stem).suffix if path.suffix.lower() in _PACKED else path.suffix
    if suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: exports are read from {', '.join(_SUFFIXES)}; convert it")
    return read_objects(path) if suffix.lower() == ".json" else read_rows(path)


def import_row(
    where: str, row: Row, tool: Tool, roles: Roles, counts: StreamCounts, created: str
) -> ImportedTask:
    """The task of one row (see read_export). Raises UnusableRow for a prompt without text."""
    task, reasons = tool.parse(row, roles)
    for reason in reasons:
        counts.leave_out(where, reason)
    content = find_content(task.fields, roles)
    for name in content.unused:
        counts.leave_out(where, f"field {names([name])}, which no record holds")
    records = _records(where, task, tool, content, roles, counts, created)
    candidates = tuple(Candidate(choice.text) for choice in content.choices)
    return ImportedTask(where, content.prompt, candidates, records)


def _records(
    where: str,
    task: Task,
    tool: Tool,
    content: Content,
    roles: Roles,
    counts: StreamCounts,
    created: str,
) -> list[Preference]:
    # The ids of tasks are unique in one project of the tool; two projects may be imported.
    task_id = ":".join(filter(None, (tool.prefix, task.id, _digest(content))))
    records: list[Preference] = []
    for annotation in task.annotations:
        for record in records_of(task_id, content, annotation, roles, created):
            if isinstance(record, str):
                counts.leave_out(where, record)
            else:
                counts.used += 1
                records.append(record)
    return records


def _digest(content: Content) -> str:
    """Tells tasks apart that have the same id, or none."""
    texts = [*(m.content for m in content.prompt), *(choice.text for choice in content.choices)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
