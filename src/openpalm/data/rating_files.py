"""Ratings of single answers from files: the numbers that a reward model learns to give.

All rows of a file are in one format; a row that makes no sense is refused with its line, its field
and what to do.
"""

from pathlib import Path
from typing import Any

from openpalm.data.corpus import read_rows, shown
from openpalm.data.pair_files import prompt_of
from openpalm.data.preferences import (
    Preference,
    Rating,
    Usable,
    at,
    expect,
    is_number,
    ratings,
    says,
)
from openpalm.data.sources import is_rows
from openpalm.errors import DataError

ANSWER_FIELDS = ("response", "completion")
VALUE_FIELDS = ("rating", "label", "score")


def read_ratings(path: str | Path, axis: str | None = None) -> Usable[Rating]:
    """Ratings of a .jsonl or .jsonl.gz file.

    Formats: Preference records, of which those of kind rate are used; rows of `prompt` (a text or
    messages), `response` or `completion` (a text), and `rating`, `label` or `score` (a number).
    axis: which one, where records rate several. Raises DataError with line, field and remedy.
    """
    path = Path(path)
    if not is_rows(path):
        raise DataError(f"{path}: ratings are read from .jsonl or .jsonl.gz; convert it")
    records: list[Preference] = []
    found: list[Rating] = []
    for where, row in read_rows(path):
        if {"kind", "payload"} <= row.keys():
            records.append(Preference.from_json(row, where))
        else:
            found.append(at(where, _rating, row))
        if records and found:
            raise DataError(
                f"{where}: this row is of another format than the first; split the file"
            )
    if not records and not found:
        raise DataError(f"{path}: is empty; give a file with at least one rating")
    return _of_axis(ratings(records) if records else Usable(found, {}), path, axis)


def _of_axis(given: Usable[Rating], path: Path, axis: str | None) -> Usable[Rating]:
    if not given.items:
        raise DataError(f"{path}: holds no rating; records of kind rate, or rows with one, give it")
    axes = sorted({rating.axis for rating in given.items})
    said = ", ".join(shown(name) for name in axes[:8])
    if axis is not None and axis not in axes:
        raise DataError(f"--axis {shown(axis)}: {path} rates {said if any(axes) else 'no axis'}")
    if axis is None and len(axes) > 1:
        raise DataError(f"{path}: rates {len(axes)} axes ({said}); say which with --axis")
    kept = [rating for rating in given.items if axis in (None, rating.axis)]
    other = {"another axis": len(given.items) - len(kept)} if len(kept) < len(given.items) else {}
    return Usable(kept, given.unused | other)


def _rating(row: dict[str, Any]) -> Rating:
    answer_field, answer = _one_of(row, ANSWER_FIELDS)
    value_field, value = _one_of(row, VALUE_FIELDS)
    expect(answer_field, answer, "a text that is not blank", _is_answer)
    expect(value_field, value, "a number", is_number)
    return Rating(prompt_of(row), says(answer), "", value)


def _one_of(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The field of those that a row has, and its value."""
    present = [name for name in names if row.get(name) is not None]
    if len(present) != 1:
        raise DataError(
            f"has {' and '.join(present) or 'none'} of the fields {', '.join(names)}; "
            "a rating is one answer and one number"
        )
    return present[0], row[present[0]]


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
