"""Verdicts from files: answers that are each good or bad by themselves, which KTO learns from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpalm.data.forms import (
    COMPLETIONS,
    EXPLICIT,
    HH,
    TEXTS,
    VERDICT,
    WHOLE,
    answer_of,
    check_answer,
    name_of,
    prompt_of,
    read_forms,
)
from openpalm.data.pair_files import row_pair
from openpalm.data.preferences import Pair, Preference, Usable, Verdict, binary, pairs


def read_verdicts(path: str | Path) -> Usable[Verdict]:
    """Verdicts of a .jsonl or .jsonl.gz file.

    Forms: Preference records; prompt (a text or messages), completion or response, and label:
    true is good, false is bad; pairs with a chosen and a rejected answer, which give one good and
    one bad verdict, as records do where none of them judges an answer by itself. Raises DataError
    with line, field and remedy.
    """
    makers = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), _both)
    return read_forms(path, "verdict", {VERDICT: _verdict} | makers, _of_records)


def _of_records(records: list[Preference]) -> Usable[Verdict]:
    if (found := binary(records)).items:
        return found
    contests = pairs(records)
    return Usable([v for pair in contests.items for v in _verdicts(pair)], contests.unused)


def _both(row: dict[str, Any]) -> Iterator[Verdict]:
    for pair in row_pair(row):
        yield from _verdicts(pair)


def _verdicts(pair: Pair) -> Iterator[Verdict]:
    yield Verdict(pair.prompt, pair.chosen, good=True)
    yield Verdict(pair.prompt, pair.rejected, good=False)


def _verdict(row: dict[str, Any]) -> Iterator[Verdict]:
    prompt, field = prompt_of(row), name_of(row, COMPLETIONS)
    answer = answer_of(row, field, prompt)
    check_answer(answer, field)
    yield Verdict(prompt, answer, row["label"])
