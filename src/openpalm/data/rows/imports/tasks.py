"""What the exports of annotation tools have in common: a task, its annotations, their answers.

One parser a tool makes tasks of its rows; imports/judgements.py makes preference records of tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, get_args

from openpalm.base.console import shown
from openpalm.base.typed import is_number
from openpalm.data.rows.payloads import Kind
from openpalm.errors import DataError

IGNORE = "ignore"
UNKNOWN_USER = "unknown user"
UNJUDGED = "no judgement"
"""reason of a task that nobody has judged"""
Form = Literal["side", "rating", "order", "label", "text"]
"""side: left or right; rating: a number; order: groups of names, best first; label: one label;
text: a text, which may be a label where the tool does not tell them apart"""


class Answer(NamedTuple):
    """The answer to one question of a task."""

    question: str
    form: Form
    value: Any
    about: tuple[str, ...] = ()
    """the fields that it is about, if the tool says so"""


class Annotation(NamedTuple):
    """All answers that one person submitted together."""

    id: str
    author: str
    created: str | None
    elapsed_s: float | None
    answers: list[Answer]


class Task(NamedTuple):
    """A row of an export: the fields that people saw, and what they answered."""

    id: str
    fields: dict[str, Any]
    annotations: list[Annotation]


@dataclass(frozen=True)
class Roles:
    """Says which fields and questions of an export are what, where their names do not say it."""

    prompt: str | None = None
    """the field with the prompt"""
    completions: tuple[str, ...] = ()
    """the fields with the completions, in order"""
    questions: Mapping[str, str] = field(default_factory=dict)
    """question -> the kind of record that it gives (compare, rank, rate, ...), or `ignore`"""

    def __post_init__(self) -> None:
        kinds = (*get_args(Kind), IGNORE)
        for question, kind in self.questions.items():
            if kind not in kinds:
                raise DataError(
                    f"question {shown(question)} cannot give {shown(kind)}; say one of "
                    f"{', '.join(kinds)}"
                )


def parse_time(value: object, name: str) -> str | None:
    """A time with its zone, in ISO 8601; one without a zone is UTC, a number is since 1970.

    pandas writes milliseconds, other programs seconds. Raises DataError.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
        elif is_number(value):
            assert isinstance(value, int | float)
            time = datetime.fromtimestamp(value / 1000 if abs(value) > 1e11 else value, UTC)
        else:
            raise ValueError
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()
    except (ValueError, OverflowError, OSError):
        said = shown(value) if isinstance(value, str) else str(value)[:60]
        raise DataError(f'field "{name}" is {said}; it must be a time') from None


def parse_name(value: object, name: str) -> str:
    """A person's id or name: a text or a whole number. Raises DataError."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return str(value)
    raise DataError(f'field "{name}" is {shown(value)}; it must be an id: a text or a number')
