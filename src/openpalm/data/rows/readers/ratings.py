"""Reads ratings of single completions from files: the numbers that a reward model predicts."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.base.console import shown
from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import RATINGS, Row
from openpalm.data.rows.messages import (
    assistant_turn,
    parse_prompt,
    parse_prompt_and_completion,
    parse_responses,
)
from openpalm.data.rows.preferences import Rating, ratings_from_preferences
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.rows.readers.pairs import parse_scores
from openpalm.data.rows.row_formats import LABELLED, RATING, SCORED, RowReader
from openpalm.errors import DataError


def read_ratings(path: str | Path, axis: str | None = None) -> ReadResult[Rating]:
    """Ratings of a .jsonl or .jsonl.gz file, on one axis.

    Formats: preference records of kind rate; prompt (a text or messages), response or completion,
    and `rating`, `label` or `score` (a number) or `ratings` (a number for each axis); prompt,
    responses and `scores`; the formats of data/rows/public_datasets.py. `axis` is needed if a
    file rates several. Raises DataError with line, field and remedy.
    """
    converters = {RATING: row_to_ratings, SCORED: _scored_row_to_ratings, LABELLED: row_to_ratings}
    found = RowReader("rating", converters, ratings_from_preferences).read(path)
    return _select_axis(found, Path(path), axis)


def _select_axis(found: ReadResult[Rating], path: Path, axis: str | None) -> ReadResult[Rating]:
    found.refuse_empty(path, "rating")
    axes = sorted({rating.axis for rating in found.items})
    listed = ", ".join(shown(name) for name in axes[:8])
    if axis is not None and axis not in axes:
        raise DataError(f"--axis {shown(axis)}: {path} rates {listed if any(axes) else 'no axis'}")
    if axis is None and len(axes) > 1:
        raise DataError(f"{path}: rates {len(axes)} axes ({listed}); say which with --axis")
    return found.map(lambda rating: rating if axis in (None, rating.axis) else "another axis")


def row_to_ratings(row: Row) -> Iterator[Rating]:
    prompt, completion = parse_prompt_and_completion(row)
    for axis, value in _parse_ratings(row).items():
        yield Rating(prompt, completion, axis, value)


def _parse_ratings(row: Row) -> dict[str, float]:
    """The number of each axis; the axis of a single number has no name."""
    field = row.find_name((*RATINGS, "ratings"))
    value = row.get(field)
    if field != "ratings":
        expect(field, value, "a number", is_number)
        return {"": value}
    expect(field, value, "an object with a number for each axis", lambda v: isinstance(v, dict))
    for axis, number in value.items():
        expect(f"{field}.{axis}", number, "a number", is_number)
    return value


def _scored_row_to_ratings(row: Row) -> Iterator[Rating | str]:
    prompt = parse_prompt(row)
    for text, score in zip(parse_responses(row), parse_scores(row), strict=True):
        rating = Rating(prompt, assistant_turn(text), "", score)
        yield rating if text.strip() else "empty completion"
