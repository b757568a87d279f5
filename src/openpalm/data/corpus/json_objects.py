"""Reads the objects of a .json file one by one: an array of objects, or objects in a row.

The array is split without parsing it, so memory is that of one object, and each object has the
bounds of a line of a .jsonl file.
"""

import re
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from openpalm.data.corpus.json_lines import (
    BLOCK_BYTES,
    BOM,
    MAX_LINE_BYTES,
    parse_row,
    refuse_binary,
)
from openpalm.data.corpus.line_streams import no_tap, open_lines
from openpalm.errors import DataError

_BETWEEN = re.compile(rb"[\s,\[\]]*")
_IN_STRING = re.compile(rb'["\\]')
_IN_OBJECT = re.compile(rb'["{}\[\]]')


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path, record N", object) of each object, counted from 1. Raises DataError."""
    for where, data in split_objects(path, str(path)):
        yield where, parse_object(data, where)


def split_objects(path: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """("name, record N", its bytes) of each object, for `parse_object`. Raises DataError.

    `name` stands for the path in places and messages.
    """
    with open_lines(path, no_tap) as stream:
        for number, data in enumerate(_Splitter(name).split(stream), start=1):
            yield f"{name}, record {number}", data


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Raises DataError that begins with `where`."""
    refuse_binary(data, where)
    return parse_row(data, where)


class _Splitter:
    """Finds where each object begins and ends; the file may be cut anywhere into blocks."""

    def __init__(self, name: str):
        self._name = name
        self._number = 0
        self._arrays = 0
        """brackets that are open around the objects"""
        self._depth = 0
        """brackets that are open in the current object; 0 between objects"""
        self._in_string = False

    def split(self, stream: BufferedIOBase) -> Iterator[bytes]:
        begun = bytearray()  # the current object as far as earlier blocks hold it
        position = 0
        block = stream.read(BLOCK_BYTES).removeprefix(BOM)
        while block:
            start = 0
            while position < len(block):
                if self._depth:
                    position = self._next(block, position)
                    if not self._depth:
                        yield bytes(begun) + block[start:position]
                        begun.clear()
                else:
                    start = self._find_object(block, position)
                    position = start + 1
            if self._depth:
                begun += block[start:]
                if len(begun) > MAX_LINE_BYTES:
                    raise self._error(f"is longer than {MAX_LINE_BYTES} bytes; split it")
            # A block may end between a backslash and the byte that it escapes: skip that byte.
            position = max(position - len(block), 0) if self._depth else 0
            block = stream.read(BLOCK_BYTES)
        if self._depth or self._arrays:
            raise self._error("the file ends before its last bracket; fetch it again")

    def _find_object(self, block: bytes, position: int) -> int:
        """The place of the next object's opening bracket, or the end of the block."""
        found = _BETWEEN.match(block, position)
        assert found
        self._arrays += found.group().count(b"[") - found.group().count(b"]")
        end = found.end()
        if end < len(block):
            self._number += 1
            self._depth = 1
            if block[end : end + 1] != b"{":
                raise self._error(
                    "is no JSON object; the file must hold an array of objects, or one object"
                )
        return end

    def _next(self, block: bytes, position: int) -> int:
        """Moves behind the next byte that matters: a quote, a backslash or a bracket."""
        found = (_IN_STRING if self._in_string else _IN_OBJECT).search(block, position)
        if not found:
            return len(block)
        mark = found.group()
        if mark == b"\\":
            return found.end() + 1
        if mark == b'"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if mark in b"{[" else -1
        return found.end()

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._name}, record {self._number}: {reason}")
