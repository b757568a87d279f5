"""Pairs of answers from files, in the formats that people keep them in.

All rows of a file are in one format, which their keys tell; a row that makes no sense is refused
with its line, its field and what to do.
"""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from openpalm.data.conversation import Message
from openpalm.data.corpus import is_rows, read_rows
from openpalm.data.preferences import (
    Messages,
    Pair,
    Preference,
    Tie,
    Usable,
    at,
    check_prompt,
    expect,
    is_number,
    messages_of,
    pairs,
    says,
    ties,
)
from openpalm.errors import DataError

_RECORD = "a Preference record"
_EXPLICIT = "prompt, chosen, rejected"
_HH = "Anthropic HH texts"
_TEXTS = "whole texts"
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def read_pairs(path: str | Path) -> Usable[Pair]:
    """Pairs of a .jsonl or .jsonl.gz file, all in one format, which the keys tell.

    Formats: Preference records; prompt, chosen, rejected (texts or messages; the answers may
    repeat the prompt); chosen and rejected alone, whose common beginning is the prompt: message
    lists, Anthropic HH texts, or plain texts, parted at a white space. A row may have a `margin`.
    Raises DataError with line, field and remedy.
    """
    records, found = _read(Path(path))
    return pairs(records) if records else Usable(found, {})


def read_ties(path: str | Path) -> list[Tie]:
    """The ties of a file that `read_pairs` reads; only Preference records can have any."""
    return ties(_read(Path(path))[0]).items


def _read(path: Path) -> tuple[list[Preference], list[Pair]]:
    """The rows of a file: records, or pairs."""
    if not is_rows(path):
        raise DataError(f"{path}: pairs are read from .jsonl or .jsonl.gz; convert it")
    records: list[Preference] = []
    found: list[Pair] = []
    first = ""
    for where, row in read_rows(path):
        form = at(where, _format, row)
        first = first or form
        if form != first:
            raise DataError(f"{where}: this row is {form}, the first is {first}; split the file")
        if form == _RECORD:
            records.append(Preference.from_json(row, where))
        else:
            found.append(at(where, _pair, row, form))
    if not first:
        raise DataError(f"{path}: is empty; give a file with at least one pair")
    return records, found


def _format(row: dict[str, Any]) -> str:
    if {"kind", "payload"} <= row.keys():
        return _RECORD
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise DataError(
                f'field "{name}" is missing; write "prompt", "chosen" and "rejected", '
                "or both answers with the conversation before them"
            )
    if row.get("prompt") is not None:
        return _EXPLICIT
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        return _HH if _HH_TURN.match(row["chosen"]) else _TEXTS
    return "whole conversations"


def _pair(row: dict[str, Any], form: str) -> Pair:
    if form == _EXPLICIT:
        prompt = prompt_of(row)
        chosen, rejected = (_answer(row, name, prompt) for name in ("chosen", "rejected"))
    elif form == _TEXTS:
        prompt, chosen, rejected = _part_texts(row["chosen"], row["rejected"])
    else:
        parse = _hh if form == _HH else messages_of
        prompt, chosen, rejected = _part(
            *(parse(row[side], side) for side in ("chosen", "rejected"))
        )
    if _stripped(chosen) == _stripped(rejected):
        raise DataError('field "chosen" equals "rejected"; mend this line or leave it out')
    if not prompt:
        raise DataError(
            'field "prompt" is missing, and the answers have no common beginning; add it'
        )
    check_prompt(prompt)
    _check_answer(chosen, "chosen")
    _check_answer(rejected, "rejected")
    margin = row.get("margin")
    expect("margin", margin, "a number or null", lambda v: v is None or is_number(v))
    return Pair(prompt, chosen, rejected, None if margin is None else float(margin))


def _part(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The common beginning, and what follows it on either side."""
    both = zip(_stripped(chosen), _stripped(rejected), strict=False)
    n = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
    return chosen[:n], chosen[n:], rejected[n:]


def _part_texts(chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    """The same for texts, cut at white space: a word that both begin alike stays whole in both."""
    both = zip(chosen, rejected, strict=False)
    n = len(list(takewhile(lambda letters: letters[0] == letters[1], both)))
    while n and not chosen[n - 1].isspace():
        n -= 1
    prompt = (Message("user", chosen[:n].strip()),) if chosen[:n].strip() else ()
    return prompt, says(chosen[n:].strip()), says(rejected[n:].strip())


def prompt_of(row: dict[str, Any]) -> Messages:
    """The messages of a row's "prompt": a text, messages, or Anthropic's HH text."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        messages = messages_of(prompt, "prompt")
    elif _HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        messages = _hh(prompt, "prompt")[:-1]
    else:
        messages = (Message("user", prompt),)
    check_prompt(messages)
    return messages


def _answer(row: dict[str, Any], field: str, prompt: Messages) -> Messages:
    if isinstance(row[field], str):
        return says(row[field])
    messages = messages_of(row[field], field)
    repeats = _stripped(messages[: len(prompt)]) == _stripped(prompt)
    return messages[len(prompt) :] if repeats else messages


def _check_answer(answer: Messages, field: str) -> None:
    if not answer or any(m.role == "assistant" and not m.content.strip() for m in answer):
        raise DataError(f'field "{field}" has an empty answer; mend this line or leave it out')
    if not answer[0].role == answer[-1].role == "assistant":
        raise DataError(
            f'field "{field}" must begin and end with an assistant turn after the prompt; '
            "write both as answers to the same prompt"
        )


def _hh(text: str, field: str) -> Messages:
    before, *turns = _HH_TURN.split(text)
    if before or not turns:
        raise DataError(f'field "{field}" does not begin with "Human:"; write it like the others')
    return tuple(
        Message("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    )


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(m.role, m.content.strip()) for m in messages]
