"""Streams the rows of a file of which single rows may be unusable: .jsonl, .json, .csv, .txt.

For uploads: memory does not grow with the file, and a row that cannot be read is yielded as its
reason, so that the next one is read. The readers of training files refuse such a file instead.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpalm.data.corpus.json_lines import BLOCK_BYTES, parse_lines, read_lines
from openpalm.data.corpus.json_objects import parse_object, split_objects
from openpalm.data.corpus.line_streams import no_tap
from openpalm.errors import DataError

MAX_CELL = 4 * 2**20
MAX_UNPACKED = 4 * 2**30
"""bytes of a compressed file: a bomb of 200 MB could hold 200 GB"""
Given = dict[str, Any]


def stream_rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    """("name:line", row or reason); `name` stands for the path in places and reasons.

    A .json file is an array of objects, a .csv file has a header, a .txt file a prompt on each
    line. Raises DataError if the file itself is damaged.
    """
    if path.name.endswith(".csv"):
        return _csv_rows(path, name)
    if path.name.endswith(".txt"):
        return _text_rows(path, name)
    if path.name.endswith(".json"):
        return _object_rows(path, name)
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
                yield where, _without_place(where, error)


def _object_rows(path: Path, name: str) -> Iterator[tuple[str, Given | str]]:
    for where, data in split_objects(path, name):
        try:
            yield where, parse_object(data, where)
        except DataError as error:
            yield where, _without_place(where, error)


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


def _without_place(where: str, error: DataError) -> str:
    """The message without its place: equal reasons are counted together."""
    return str(error).removeprefix(f"{where}: ")
