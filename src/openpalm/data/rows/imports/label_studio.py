"""Tasks from Label Studio's exports: JSON (tasks with annotations) and JSON-MIN (one row each).

Results of the tags Pairwise, Rating, Ranker, Choices, TextArea and Number are read. JSON-MIN has
neither the tags nor what they are about: the form of a column says whether it is answers or data.
"""

from collections.abc import Iterator
from typing import Any

from openpalm.base.console import shown
from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import is_blank
from openpalm.data.rows.imports.judgements import BAD, BOTH_BAD, GOOD, TIE
from openpalm.data.rows.imports.task_fields import is_content_name, normal
from openpalm.data.rows.imports.tasks import (
    UNJUDGED,
    UNKNOWN_USER,
    Annotation,
    Answer,
    Roles,
    Task,
    parse_name,
    parse_time,
)

_VALUES = ("selected", "rating", "ranker", "choices", "text", "number")
_OWN = frozenset(
    (
        *("id", "annotator", "annotation_id", "created_at", "updated_at"),
        *("lead_time", "agreement"),
    )
)
_LABELS = TIE | BOTH_BAD | GOOD | BAD | {"left", "right"}
Row = dict[str, Any]


def is_label_studio(row: Row) -> bool:
    return isinstance(row.get("data"), dict) and "annotations" in row


def is_label_studio_min(row: Row) -> bool:
    return "annotation_id" in row or {"annotator", "lead_time"} <= row.keys()


def parse_label_studio(row: Row) -> tuple[Task, list[str]]:
    """The task, and a reason for each annotation or result that is not used."""
    given = row["annotations"]
    expect("annotations", given, "a list of annotations", lambda v: isinstance(v, list))
    reasons = [] if given else [UNJUDGED]
    for name, reason in (("predictions", "a prediction of a model"), ("drafts", "a draft")):
        listed = row.get(name)
        expect(name, listed, "a list", lambda v: v is None or isinstance(v, list))
        reasons += [reason] * len(listed or ())
    annotations = []
    for i, annotation in enumerate(given):
        where = f"annotations[{i}]"
        expect(where, annotation, "an object", lambda v: isinstance(v, dict))
        if annotation.get("was_cancelled"):
            reasons.append("a skipped annotation")
            continue
        results = annotation.get("result")
        expect(f"{where}.result", results, "a list of results", lambda v: isinstance(v, list))
        answers, unread = _answers(results, where)
        reasons += unread
        number = annotation.get("id", i)
        author = _annotator(annotation.get("completed_by"), f"{where}.completed_by")
        if answers or not unread:  # an annotation whose results are all unread is counted by them
            annotations.append(
                Annotation(
                    parse_name(number, f"{where}.id"),
                    author,
                    parse_time(annotation.get("created_at"), f"{where}.created_at"),
                    _seconds(annotation.get("lead_time"), f"{where}.lead_time"),
                    answers,
                )
            )
    number = row.get("id")
    task_id = "" if number is None else parse_name(number, "id")
    return Task(task_id, row["data"], annotations), reasons


def parse_label_studio_min(row: Row, roles: Roles) -> tuple[Task, list[str]]:
    """The same of a row of JSON-MIN, which holds one annotation."""
    answers: list[Answer] = []
    fields: Row = {}
    for name, value in row.items():
        if name in _OWN:
            continue
        found = list(_min_answers(name, value, roles))
        answers += found
        if not found:
            fields[name] = value
    annotation = Annotation(
        parse_name(row.get("annotation_id", 0), "annotation_id"),
        _annotator(row.get("annotator"), "annotator"),
        parse_time(row.get("created_at"), "created_at"),
        _seconds(row.get("lead_time"), "lead_time"),
        answers,
    )
    number = row.get("id")
    return Task("" if number is None else parse_name(number, "id"), fields, [annotation]), []


def _answers(results: list[Any], where: str) -> tuple[list[Answer], list[str]]:
    answers: list[Answer] = []
    reasons = []
    for i, result in enumerate(results):
        at = f"{where}.result[{i}]"
        expect(at, result, "an object", lambda v: isinstance(v, dict))
        value, kind = result.get("value"), result.get("type")
        if not isinstance(value, dict) or not {*_VALUES} & value.keys():
            reasons.append(f"a result of type {shown(kind)}, which no record holds")
            continue
        about = result.get("to_name")
        names = tuple(about.split(",")) if isinstance(about, str) else ()
        answers.append(_answer(str(result.get("from_name")), value, names, at))
    return answers, reasons


def _answer(question: str, value: Row, about: tuple[str, ...], where: str) -> Answer:
    """The answer in the value of a result."""
    name = next(name for name in _VALUES if name in value)
    given = value[name]
    match name:
        case "selected":
            return Answer(question, "side", given, about)
        case "rating" | "number":
            expect(f"{where}.value.{name}", given, "a number", is_number)
            return Answer(question, "rating", given, about)
        case "ranker":
            # A Ranker with buckets gives an object; judgements.py counts it.
            order = [[item] for item in given] if isinstance(given, list) else None
            return Answer(question, "order", order)
        case "choices":
            expect(f"{where}.value.choices", given, "a list", lambda v: isinstance(v, list))
            one = given[0] if len(given) == 1 else given
            return Answer(question, "label", one, about)
    texts = [given] if isinstance(given, str) else given
    wanted = "a text or a list of texts"
    expect(f"{where}.value.text", texts, wanted, _are_texts)
    return Answer(question, "text", "\n".join(texts), about)


def _min_answers(name: str, value: Any, roles: Roles) -> Iterator[Answer]:
    """The answers in a column of JSON-MIN; none if it is data of the task."""
    asked = name in roles.questions
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(_is_value(item) for item in value):
        for item in value:
            yield _answer(name, item, (), name)
    elif isinstance(value, str) and (
        asked or (normal(value) in _LABELS and not is_content_name(name, roles))
    ):
        yield Answer(name, "text", value)
    elif asked and is_number(value):
        yield Answer(name, "rating", value)


def _is_value(item: Any) -> bool:
    """Whether this is the value of a result; an item of a list has a text or title, and an id."""
    return isinstance(item, dict) and bool({*_VALUES} & item.keys()) and "id" not in item


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _annotator(given: Any, where: str) -> str:
    """A number, an e-mail address, or an object with both."""
    if isinstance(given, dict):
        given = given.get("email") if not is_blank(given.get("email")) else given.get("id")
    return UNKNOWN_USER if is_blank(given) else parse_name(given, where)


def _seconds(given: Any, where: str) -> float | None:
    wanted = "seconds or null"
    expect(where, given, wanted, lambda v: v is None or (is_number(v) and v >= 0))
    return given
