"""Verdicts from files: answers that are each good or bad by themselves, which KTO learns from."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.data.rows.fields import COMPLETIONS, Row
from openpalm.data.rows.pair_files import row_pair
from openpalm.data.rows.preferences import (
    LabelledCompletion,
    Pair,
    Preference,
    ReadResult,
    binary,
    pairs,
)
from openpalm.data.rows.row_formats import (
    EXPLICIT,
    HH,
    LABELLED,
    TEXTS,
    WHOLE,
    Reading,
    answer_of,
    check_answer,
    prompt_of,
    read_forms,
    texts_of,
)


def read_labelled_completions(path: str | Path) -> ReadResult[LabelledCompletion]:
    """Verdicts of a .jsonl or .jsonl.gz file.

    Forms: Preference records; prompt (a text or messages), completion or response, and label:
    true is good, false is bad; pairs with a chosen and a rejected answer, which give one good and
    one bad verdict, as records do where none of them judges an answer by itself. Raises DataError
    with line, field and remedy.
    """
    makers = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), _both)
    reading = Reading("verdict", {LABELLED: _verdict} | makers, _texts)
    return read_forms(path, reading, _of_records)


def _texts(verdict: LabelledCompletion) -> Iterator[str]:
    return texts_of((*verdict.prompt, *verdict.completion))


def _of_records(records: list[Preference]) -> ReadResult[LabelledCompletion]:
    if (found := binary(records)).items:
        return found
    contests = pairs(records)
    both = [v for pair in contests.items for v in _verdicts(pair)]
    places = [place for place in contests.places for _ in range(2)]
    return ReadResult(both, contests.unused, places, contests.unused_places)


def _both(row: Row) -> Iterator[LabelledCompletion]:
    for pair in row_pair(row):
        yield from _verdicts(pair)


def _verdicts(pair: Pair) -> Iterator[LabelledCompletion]:
    yield LabelledCompletion(pair.prompt, pair.chosen, good=True)
    yield LabelledCompletion(pair.prompt, pair.rejected, good=False)


def _verdict(row: Row) -> Iterator[LabelledCompletion]:
    prompt, field = prompt_of(row), row.name(COMPLETIONS)
    answer = answer_of(row, field, prompt)
    check_answer(answer, field)
    yield LabelledCompletion(prompt, answer, row.get("label"))
