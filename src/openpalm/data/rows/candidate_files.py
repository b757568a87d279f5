"""Prompts with two or more answers that are still to be judged, from files."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from openpalm.data.rows.fields import Row
from openpalm.data.rows.preferences import Candidate, Messages, Preference, ReadResult
from openpalm.data.rows.read_result import collect_results
from openpalm.data.rows.row_formats import (
    PROMPT,
    RANKING,
    SCORED,
    Reading,
    prompt_of,
    read_forms,
    responses_of,
    texts_of,
)


class CandidateRow(NamedTuple):
    prompt: Messages
    candidates: tuple[Candidate, ...]


def read_candidates(path: str | Path) -> ReadResult[CandidateRow]:
    """Rows of prompt and responses (or answers), or Preference records, to be judged again.

    Raises DataError with line, field and remedy.
    """
    makers = {PROMPT: _row, RANKING: _row, SCORED: _row}
    return read_forms(path, Reading("set of answers", makers, _texts), _of_records)


def _texts(found: CandidateRow) -> Iterator[str]:
    yield from texts_of(found.prompt)
    yield from (candidate.text for candidate in found.candidates)


def _row(row: Row) -> Iterator[CandidateRow | str]:
    texts = responses_of(row)
    yield CandidateRow(prompt_of(row), tuple(map(Candidate, texts)))


def _of_records(records: list[Preference]) -> ReadResult[CandidateRow]:
    seen: set[tuple[Messages, tuple[str, ...]]] = set()

    def made(record: Preference) -> CandidateRow | str:
        answers = tuple(c.text for c in record.candidates)
        if len(answers) < 2:
            return "fewer than two answers"
        if (record.prompt, answers) in seen:
            return "repeated answers"
        seen.add((record.prompt, answers))
        found = tuple(Candidate(c.text, c.checkpoint) for c in record.candidates)
        return CandidateRow(record.prompt, found)

    return collect_results((record.id, made(record)) for record in records)
