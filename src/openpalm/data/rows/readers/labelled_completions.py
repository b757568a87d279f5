"""Reads completions labelled good or bad, one by one, for KTO (unpaired preferences)."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.data.rows.fields import Row
from openpalm.data.rows.messages import parse_prompt_and_completion
from openpalm.data.rows.preferences import (
    LabelledCompletion,
    Pair,
    Preference,
    labelled_completions_from_preferences,
    pairs_from_preferences,
)
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.rows.readers.pairs import row_to_pair
from openpalm.data.rows.row_formats import EXPLICIT, HH, LABELLED, TEXTS, WHOLE, RowReader


def read_labelled_completions(path: str | Path) -> ReadResult[LabelledCompletion]:
    """Labelled completions of a .jsonl or .jsonl.gz file.

    Formats: preference records; prompt (a text or messages), completion or response, and label
    (true is good, false is bad); pairs of chosen and rejected, which give one good and one bad
    completion, as preference records do if none of them labels a single completion. Raises
    DataError with line, field and remedy.
    """
    converters = {LABELLED: row_to_labelled_completion}
    converters |= dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), _pair_row_to_labelled_completions)
    return RowReader("labelled completion", converters, _from_preferences).read(path)


def row_to_labelled_completion(row: Row) -> Iterator[LabelledCompletion]:
    yield LabelledCompletion(*parse_prompt_and_completion(row), row.get("label"))


def _pair_row_to_labelled_completions(row: Row) -> Iterator[LabelledCompletion]:
    for pair in row_to_pair(row):
        yield from _label_both(pair)


def _label_both(pair: Pair) -> list[LabelledCompletion]:
    return [
        LabelledCompletion(pair.prompt, pair.chosen, good=True),
        LabelledCompletion(pair.prompt, pair.rejected, good=False),
    ]


def _from_preferences(preferences: list[Preference]) -> ReadResult[LabelledCompletion]:
    # A file of comparisons only is still useful: KTO learns from both completions of each pair.
    if (found := labelled_completions_from_preferences(preferences)).items:
        return found
    pairs = pairs_from_preferences(preferences)
    labelled = [completion for pair in pairs.items for completion in _label_both(pair)]
    places = [place for place in pairs.places for _ in range(2)]
    return ReadResult(labelled, pairs.unused, places, pairs.unused_places)
