"""Tasks from Argilla's exports, as rows of JSON.

Argilla 2: `to_json` (`responses`: question -> list of value, user_id) and `to_datasets` (columns
`QUESTION.responses`, `.responses.users`, `.responses.status`). Argilla 1: records of a
FeedbackDataset (`responses`: a list of user_id, status, values), and its data sets on the hub (a
column of user_id, value, status for each question). A response without a status is taken for
submitted: `to_json` of Argilla 2 writes none, not even for drafts.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from openpalm.base.console import shown
from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import is_blank
from openpalm.data.rows.imports.tasks import (
    UNJUDGED,
    UNKNOWN_USER,
    Annotation,
    Answer,
    Task,
    parse_name,
    parse_time,
)
from openpalm.errors import DataError

_RESPONSES = ".responses"
_SUGGESTED = (".suggestion", "-suggestion")
_COLUMNS = frozenset(
    (
        *("id", "external_id", "_server_id", "status", "metadata", "vectors"),
        *("inserted_at", "updated_at"),
    )
)
Row = dict[str, Any]


class Response(NamedTuple):
    question: str
    user: str
    value: Any
    status: str


def is_argilla(row: Row) -> bool:
    return (
        ("fields" in row and "responses" in row and isinstance(row["fields"], dict))
        or any(name.endswith(_RESPONSES) for name in row)
        or any(_is_answer_column(value) for value in row.values())
    )


def parse_argilla(row: Row) -> tuple[Task, list[str]]:
    """The task, and a reason for each response or suggestion that is not used."""
    if "fields" in row:
        fields, responses = row["fields"], list(_nested_responses(row))
        expect("fields", fields, "an object", lambda v: isinstance(v, dict))
        suggestions = row.get("suggestions")
        suggested = 0 if is_blank(suggestions) else _count_suggestions(suggestions)
    else:
        fields, responses, suggested = _columns(row)
    reasons = ["a suggestion of a model"] * suggested
    answers: dict[str, list[Answer]] = {}
    for response in responses:
        if response.status != "submitted":
            reasons.append(f"{shown(response.status)[1:-1]} response")
        elif is_blank(response.value):
            reasons.append("a blank answer")
        else:
            answers.setdefault(response.user, []).append(_answer(response))
    if not responses:
        reasons.append(UNJUDGED)
    created = parse_time(row.get("updated_at") or row.get("inserted_at"), "updated_at")
    annotations = [Annotation(user, user, created, None, given) for user, given in answers.items()]
    return Task(_task_id(row), fields, annotations), reasons


def _task_id(row: Row) -> str:
    for name in ("id", "external_id", "_server_id"):
        if not is_blank(row.get(name)):
            return parse_name(row[name], name)
    return ""


# Responses in each of the shapes.


def _nested_responses(row: Row) -> Iterator[Response]:
    given = row.get("responses")
    if isinstance(given, dict):  # Argilla 2
        for question, listed in given.items():
            where = f"responses.{question}"
            if listed is not None:
                yield from _of_question(question, _as_rows(listed, where), where)
        return
    expect("responses", given, "responses", lambda v: v is None or isinstance(v, list))
    listed: list[Any] = given or []
    for i, response in enumerate(listed):
        where = f"responses[{i}]"
        expect(where, response, "an object", lambda v: isinstance(v, dict))
        values = response.get("values")
        expect(f"{where}.values", values, "an object", lambda v: v is None or isinstance(v, dict))
        user, status = _user(response, where), _status(response, where)
        if not values:  # discarded before a question was answered
            yield Response("", user, None, status)
        for question, value in (values or {}).items():
            # Argilla 1 wraps each value in an object.
            wrapped = isinstance(value, dict) and "value" in value
            yield Response(question, user, value["value"] if wrapped else value, status)


def _columns(row: Row) -> tuple[Row, list[Response], int]:
    """The fields, the responses and the number of suggestions of a row without nesting."""
    responses: list[Response] = []
    questions = {name.removesuffix(_RESPONSES) for name in row if name.endswith(_RESPONSES)}
    answered = {name for name, value in row.items() if _is_answer_column(value)}
    for question in sorted(questions):
        responses += _of_flat_question(question, row)
    for question in sorted(answered):
        responses += _of_question(question, _as_rows(row[question], question), question)
    asked = questions | answered
    suggested = [name for name in row if name.endswith(_SUGGESTED) and not is_blank(row[name])]
    fields = {
        name: value
        for name, value in row.items()
        if name not in asked | _COLUMNS
        and not any(mark in name for mark in (_RESPONSES, *_SUGGESTED, "metadata."))
    }
    return fields, responses, len(suggested)


def _of_flat_question(question: str, row: Row) -> Iterator[Response]:
    name = question + _RESPONSES
    values = row[name]
    expect(name, values, "a list or null", lambda v: v is None or isinstance(v, list))
    columns = [values or []]
    for ending in (".users", ".status"):
        column = row.get(name + ending)
        right = column is None or isinstance(column, list)
        if not right or (column is not None and len(column) != len(columns[0])):
            raise DataError(f'field "{name}{ending}" must be a list as long as "{name}"')
        columns.append(column or [None] * len(columns[0]))
    for value, user, status in zip(*columns, strict=True):
        response = {"user_id": user, "status": status}
        yield Response(question, _user(response, name), value, _status(response, name))


def _of_question(question: str, rows: Iterable[Row], where: str) -> Iterator[Response]:
    for i, response in enumerate(rows):
        at = f"{where}[{i}]"
        expect(at, response, "an object with a value", lambda v: isinstance(v, dict))
        user, status = _user(response, at), _status(response, at)
        yield Response(question, user, response.get("value"), status)


def _is_answer_column(value: Any) -> bool:
    """Whether this is Argilla 1's column of answers: rows of user_id and value, or columns."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and {"user_id", "value"} <= first.keys()


def _as_rows(value: Any, where: str) -> list[Row]:
    """`datasets` turns a list of objects into an object of lists; this turns it back."""
    if isinstance(value, dict):
        lengths = {len(v) if isinstance(v, list) else -1 for v in value.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise DataError(f'field "{where}" must have lists of equal length')
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    expect(where, value, "a list of responses", lambda v: isinstance(v, list))
    return value


def _user(response: Row, where: str) -> str:
    user = response.get("user_id")
    if user is None or user in ("None", ""):
        return UNKNOWN_USER
    return parse_name(user, f"{where}.user_id")


def _status(response: Row, where: str) -> str:
    status = response.get("status")
    wanted = "a text or null"
    expect(f"{where}.status", status, wanted, lambda v: v is None or isinstance(v, str))
    return status or "submitted"


def _count_suggestions(given: Any) -> int:
    expect("suggestions", given, "suggestions", lambda v: isinstance(v, dict | list))
    return len(given)


# Values.


def _answer(response: Response) -> Answer:
    question, value = response.question, response.value
    if is_number(value):
        return Answer(question, "rating", value)
    if isinstance(value, str):
        return Answer(question, "text", value)
    if isinstance(value, dict) and {"rank", "value"} <= value.keys():
        value = _as_rows(value, question)
    if isinstance(value, list) and all(isinstance(v, dict) and "rank" in v for v in value):
        return Answer(question, "order", _groups(value, question))
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        if len(value) == 1:
            return Answer(question, "label", value[0])
        return Answer(question, "order", [[name] for name in value])
    return Answer(question, "label", value)


def _groups(ranked: list[Row], question: str) -> list[list[Any]]:
    """The values in groups of equal rank, best first."""
    groups: dict[float, list[Any]] = {}
    for item in ranked:
        wanted = "a number"
        expect(f"{question}.rank", item["rank"], wanted, lambda v: is_number(v))
        groups.setdefault(item["rank"], []).append(item.get("value"))
    return [groups[rank] for rank in sorted(groups)]
