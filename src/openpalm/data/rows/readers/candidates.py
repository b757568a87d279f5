"""Reads prompts with two or more completions to be judged (candidates) from files of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from openpalm.data.rows.fields import Row
from openpalm.data.rows.messages import Messages, parse_prompt, parse_responses
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.read_result import ReadResult, collect_results
from openpalm.data.rows.row_formats import PROMPT, RANKING, SCORED, RowReader


class CandidateRow(NamedTuple):
    """A prompt and the completions to choose from."""

    prompt: Messages
    candidates: tuple[Candidate, ...]


def read_candidates(path: str | Path) -> ReadResult[CandidateRow]:
    """Rows of prompt and responses (or answers), or preference records, to be judged again.

    Raises DataError with line, field and remedy.
    """
    converters = {PROMPT: row_to_candidates, RANKING: row_to_candidates, SCORED: row_to_candidates}
    return RowReader("set of answers", converters, _from_preferences).read(path)


def row_to_candidates(row: Row) -> Iterator[CandidateRow | str]:
    texts = parse_responses(row)
    yield CandidateRow(parse_prompt(row), tuple(map(Candidate, texts)))


def _from_preferences(preferences: list[Preference]) -> ReadResult[CandidateRow]:
    """Each prompt with its candidates once, without the old judgement and sampling settings."""
    seen: set[tuple[Messages, tuple[str, ...]]] = set()

    def convert(record: Preference) -> CandidateRow | str:
        texts = tuple(c.text for c in record.candidates)
        if len(texts) < 2:
            return "fewer than two completions"
        if (record.prompt, texts) in seen:
            return "repeated completions"
        seen.add((record.prompt, texts))
        candidates = tuple(Candidate(c.text, c.checkpoint) for c in record.candidates)
        return CandidateRow(record.prompt, candidates)

    return collect_results((record.id, convert(record)) for record in preferences)
