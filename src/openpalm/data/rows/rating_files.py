"""Ratings of single answers from files: the numbers that a reward model learns to give."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.base.console import shown
from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import COMPLETIONS, RATINGS, Row
from openpalm.data.rows.pair_files import scores_of
from openpalm.data.rows.preferences import Rating, ReadResult, assistant_turn, ratings
from openpalm.data.rows.row_formats import (
    LABELLED,
    RATING,
    SCORED,
    Reading,
    answer_of,
    check_answer,
    prompt_of,
    read_forms,
    responses_of,
    texts_of,
)
from openpalm.errors import DataError


def read_ratings(path: str | Path, axis: str | None = None) -> ReadResult[Rating]:
    """Ratings of a .jsonl or .jsonl.gz file.

    Forms: Preference records, of which those of kind rate are used; prompt (a text or messages),
    response or completion, and `rating`, `label` or `score` (a number) or `ratings` (a number for
    each axis); prompt, responses and `scores`; the public shapes of data/rows/public_datasets.py.
    axis: which one, where there are several. Raises DataError with line, field and remedy.
    """
    makers = {RATING: _rating, SCORED: _scored, LABELLED: _rating}
    found = read_forms(path, Reading("rating", makers, _texts), ratings)
    return _of_axis(found, Path(path), axis)


def _texts(rating: Rating) -> Iterator[str]:
    return texts_of((*rating.prompt, *rating.completion))


def _of_axis(given: ReadResult[Rating], path: Path, axis: str | None) -> ReadResult[Rating]:
    given.refuse_empty(path, "rating")
    axes = sorted({rating.axis for rating in given.items})
    said = ", ".join(shown(name) for name in axes[:8])
    if axis is not None and axis not in axes:
        raise DataError(f"--axis {shown(axis)}: {path} rates {said if any(axes) else 'no axis'}")
    if axis is None and len(axes) > 1:
        raise DataError(f"{path}: rates {len(axes)} axes ({said}); say which with --axis")
    return given.map(lambda rating: rating if axis in (None, rating.axis) else "another axis")


def _rating(row: Row) -> Iterator[Rating]:
    prompt, field = prompt_of(row), row.name(COMPLETIONS)
    answer = answer_of(row, field, prompt)
    check_answer(answer, field)
    for axis, value in _values(row).items():
        yield Rating(prompt, answer, axis, value)


def _values(row: Row) -> dict[str, float]:
    """The number of each axis; of a row with one number the axis has no name."""
    field = row.name((*RATINGS, "ratings"))
    value = row.get(field)
    if field != "ratings":
        expect(field, value, "a number", is_number)
        return {"": value}
    expect(field, value, "an object with a number for each axis", lambda v: isinstance(v, dict))
    for axis, number in value.items():
        expect(f"{field}.{axis}", number, "a number", is_number)
    return value


def _scored(row: Row) -> Iterator[Rating | str]:
    prompt = prompt_of(row)
    for text, score in zip(responses_of(row), scores_of(row), strict=True):
        yield (
            Rating(prompt, assistant_turn(text), "", score) if text.strip() else "empty completion"
        )
