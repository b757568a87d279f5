"""The rows of an uploaded file, one by one, as prompts or as items with candidates.

Reads .jsonl with every format of data/rows, .csv with a header, .txt with a prompt on each line.
A line that cannot be read is yielded as its reason with file and line, and the next one is read.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpalm.base.typed import at
from openpalm.data.corpus.json_lines import BLOCK_BYTES, parse_lines, read_lines
from openpalm.data.corpus.line_streams import no_tap
from openpalm.data.rows.fields import Row
from openpalm.data.rows.messages import Messages, parse_conversation, parse_prompt, parse_responses
from openpalm.data.rows.pair_files import row_to_pair
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.public_datasets import public_format
from openpalm.data.rows.read_result import UnusableRow
from openpalm.data.rows.row_formats import (
    EXPLICIT,
    HH,
    MESSAGES,
    PREFERENCE,
    RANKING,
    SCORED,
    SHAREGPT,
    TEXT,
    TEXTS,
    WHOLE,
    row_format,
)
from openpalm.errors import DataError

MAX_CELL = 4 * 2**20
MAX_PROMPT = 2**20
MAX_UNPACKED = 4 * 2**30
"""bytes of a compressed file: a bomb of 200 MB could hold 200 GB"""
Given = dict[str, Any]


@dataclass(frozen=True)
class UploadedItem:
    """A prompt and the completions that the file has for it."""

    prompt: Messages
    candidates: tuple[tuple[str, str], ...] = ()
    """(text, checkpoint) of each; the checkpoint is empty if the file does not say it"""
    judgement: tuple[str, dict[str, Any]] | None = None
    """kind and payload of the file's own judgement"""
    notes: tuple[str, ...] = field(default=())
    """what of the row is not taken over"""


def read_prompts(path: Path, name: str) -> Iterator[tuple[str, UploadedItem | str]]:
    """(place, prompt or reason) of each row; `name` stands for the path in places."""
    return _read(path, name, _prompt_of)


def read_items(path: Path, name: str) -> Iterator[tuple[str, UploadedItem | str]]:
    """The same for rows with completions to judge."""
    return _read(path, name, _item_of)


def _read(
    path: Path, name: str, convert: Callable[[Given], UploadedItem]
) -> Iterator[tuple[str, UploadedItem | str]]:
    for where, row in _rows(path, name):
        if isinstance(row, str):
            yield where, row
            continue
        try:
            yield where, at(where, convert, row)
        except UnusableRow as error:
            yield where, error.reason
        except DataError as error:
            yield where, _without(where, str(error))
        except RecursionError:
            yield where, "nested too deeply"


def _without(where: str, message: str) -> str:
    """The message without its place: equal reasons are counted together."""
    return message.removeprefix(f"{where}: ")


# Rows of the three kinds of files.


def _rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    if path.name.endswith(".csv"):
        return _csv_rows(path, name)
    if path.name.endswith(".txt"):
        return _text_rows(path, name)
    return _json_rows(path, name)


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    unpacked = 0
    for block in read_lines(path, no_tap, BLOCK_BYTES):
        unpacked += len(block.data)
        if unpacked > MAX_UNPACKED:
            raise DataError(f"{name}: more than {MAX_UNPACKED:,} bytes unpacked; split this file")
        for number, line in enumerate(block.data.split(b"\n"), start=block.first):
            one = block._replace(path=Path(name), first=number, data=line)
            try:
                yield from parse_lines(one)
            except DataError as error:
                where = f"{name}:{number}"
                yield where, _without(where, str(error))


def _text_rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    for block in read_lines(path, no_tap, BLOCK_BYTES):
        for number, line in enumerate(block.data.split(b"\n"), start=block.first):
            where = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield where, "not valid UTF-8"
                continue
            if "\0" in text:
                yield where, "a NUL byte, so this is not text"
            elif text:
                yield where, {"prompt": text}


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(_lines(file, name), strict=True)
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{where}: not CSV ({error}); correct this line") from None
            yield where, _cells(row)


def _lines(file: Any, name: str) -> Iterator[str]:
    """The lines of a text file, of which none is longer than a cell may be."""
    number = 0
    while line := file.readline(MAX_CELL + 1):
        number += 1
        if len(line) > MAX_CELL:
            raise DataError(f"{name}:{number}: a line of more than {MAX_CELL:,} characters")
        yield line


def _cells(row: dict[Any, Any]) -> Given | str:
    if None in row:
        return "more cells than the header has"
    texts = {key: value for key, value in row.items() if value}
    if any("\0" in text or "�" in text for text in texts.values()):
        return "not valid UTF-8 text"
    return texts


# A row -> a prompt, or a prompt with completions.


def _prompt_of(given: Given) -> UploadedItem:
    name = row_format(given)
    row = Row(given)
    if name == PREFERENCE:
        return UploadedItem(Preference.from_json(given, "row").prompt)
    if name in (MESSAGES, SHAREGPT):
        return UploadedItem(_checked(_without_completion(parse_conversation(row))))
    if name == TEXT:
        return UploadedItem(_checked(parse_prompt(Row({"prompt": given["text"]}))))
    if name in (HH, TEXTS, WHOLE):
        return UploadedItem(_checked(next(iter(row_to_pair(row))).prompt))
    if name is None and not (public := public_format(given)):
        raise _unknown(given)
    if name is None:
        return _prompt_of(next(iter(public.translate(row, "prompt"))))
    return UploadedItem(_checked(parse_prompt(row)))


def _item_of(given: Given) -> UploadedItem:
    if public := public_format(given):
        translated = list(public.translate(Row(given), "pair"))
        if len(translated) != 1:
            raise UnusableRow(f"{public.name}: {len(translated)} items in one row")
        given = translated[0]
    name, row = row_format(given), Row(given)
    if name == PREFERENCE:
        return _item_of_record(Preference.from_json(given, "row"))
    if name in (EXPLICIT, HH, TEXTS, WHOLE):
        pair = next(iter(row_to_pair(row)))
        sides = [_answer(pair.chosen), _answer(pair.rejected)]
        better = {"better": 0, "worse": 1, "strength": 1}
        return UploadedItem(
            _checked(pair.prompt), tuple((t, "") for t in sides), ("compare", better)
        )
    if name in (RANKING, SCORED) or given.get("responses") or given.get("answers"):
        texts = parse_responses(row)
        notes = ("its ranking or scores",) if name in (RANKING, SCORED) else ()
        candidates = tuple((text, "") for text in texts)
        return UploadedItem(_checked(parse_prompt(row)), candidates, notes=notes)
    prompt = _prompt_of(given)
    if name is not None and (completion := _completion(given)):
        return UploadedItem(prompt.prompt, ((completion, ""),))
    return prompt


def _item_of_record(record: Preference) -> UploadedItem:
    candidates = tuple((c.text, c.checkpoint or "") for c in record.candidates)
    return UploadedItem(record.prompt, candidates, (record.kind, record.payload))


def _completion(given: Given) -> str | None:
    """The one completion of a row that has no other."""
    for name in ("completion", "response", "output"):
        if isinstance(value := given.get(name), str) and value.strip():
            return value
    for name in ("messages", "conversations"):
        if given.get(name):
            last = parse_conversation(Row(given))[-1]
            return last.content if last.role == "assistant" else None
    return None


def _answer(turns: Messages) -> str:
    if len(turns) != 1:
        raise UnusableRow("a completion of several turns")
    return turns[0].content


def _without_completion(messages: Messages) -> Messages:
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _checked(messages: Messages) -> Messages:
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise UnusableRow("no user turn before the last completion")
    if messages[-1].role == "assistant":
        raise UnusableRow("the prompt ends with an answer")
    if sum(len(m.content) for m in messages) > MAX_PROMPT:
        raise UnusableRow(f"a prompt of more than {MAX_PROMPT:,} characters")
    return messages


def _unknown(given: Given) -> UnusableRow:
    fields = ", ".join(sorted(str(name)[:30] for name in given)[:8]) or "none"
    return UnusableRow(f"its fields ({fields}) match no known format")
