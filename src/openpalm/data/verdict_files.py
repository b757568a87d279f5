"""Verdicts from files: answers that are each good or bad by themselves, which KTO learns from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpalm.data.forms import (
    COMPLETIONS,
    VERDICT,
    answer_of,
    check_answer,
    name_of,
    prompt_of,
    read_forms,
)
from openpalm.data.preferences import Usable, Verdict, binary


def read_verdicts(path: str | Path) -> Usable[Verdict]:
    """Verdicts of a .jsonl or .jsonl.gz file.

    Forms: Preference records; prompt (a text or messages), completion or response, and label:
    true is good, false is bad. Raises DataError with line, field and remedy.
    """
    return read_forms(path, "verdict", {VERDICT: _verdict}, binary)


def _verdict(row: dict[str, Any]) -> Iterator[Verdict]:
    prompt, field = prompt_of(row), name_of(row, COMPLETIONS)
    answer = answer_of(row, field, prompt)
    check_answer(answer, field)
    yield Verdict(prompt, answer, row["label"])
