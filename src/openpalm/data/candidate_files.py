"""Prompts with two or more answers that are still to be judged, from files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.data.forms import PROMPT, RANKING, RESPONSES, name_of, prompt_of, read_forms
from openpalm.data.preferences import Candidate, Messages, Preference, Usable, expect


class CandidateRow(NamedTuple):
    prompt: Messages
    candidates: tuple[Candidate, ...]


def read_candidates(path: str | Path) -> Usable[CandidateRow]:
    """Rows of prompt and responses (or answers), or Preference records, judged anew.

    Raises DataError with line, field and remedy.
    """
    return read_forms(path, "set of answers", {PROMPT: _row, RANKING: _row}, _of_records)


def _row(row: dict[str, Any]) -> Iterator[CandidateRow | str]:
    field = name_of(row, RESPONSES)
    texts = row.get(field)
    wanted = "a list of two or more texts (or let --model write them)"
    expect(field, texts, wanted, lambda v: isinstance(v, list) and len(v) > 1)
    assert isinstance(texts, list)
    for i, text in enumerate(texts):
        expect(f"{field}[{i}]", text, "a text", lambda v: isinstance(v, str))
    yield CandidateRow(prompt_of(row), tuple(map(Candidate, texts)))


def _of_records(records: list[Preference]) -> Usable[CandidateRow]:
    rows = dict.fromkeys(
        CandidateRow(p.prompt, tuple(Candidate(c.text, c.checkpoint) for c in p.candidates))
        for p in records
        if len(p.candidates) > 1
    )
    lone = sum(len(p.candidates) < 2 for p in records)
    return Usable(list(rows), {"fewer than two answers": lone} if lone else {})
