"""Reads .tfrecords files of token ids, as mesh-transformer-jax writes them, without TensorFlow.

A record is: length (uint64), masked CRC-32C of the length, data, masked CRC-32C of the data; all
little-endian. The data is a protocol buffer tf.train.Example, a map from names to lists; the ids
are an int64 list. Both checksums are verified, and every length is checked before it is used.
"""

import struct
from collections.abc import Iterator
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import NoReturn

import numpy as np

from openpalm.base.console import names, shown
from openpalm.data.corpus.document import Document
from openpalm.data.corpus.line_streams import Tap, open_lines
from openpalm.errors import DataError

MAX_RECORD_BYTES = 64 << 20
MAX_FIELDS = 1 << 20
MAX_VARINT_BYTES = 10
# The table of the CRC has a row for each byte of a block: 4 MiB.
CRC_BLOCK_BYTES = 4096
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}


def tfrecord_documents(path: Path, feature: str, tap: Tap) -> Iterator[Document]:
    """A document of ids for each record, in order. Raises DataError for a damaged file."""
    with open_lines(path, tap) as stream:
        number = 0
        while (record := _next_record(stream, f"{path}: record {number + 1}")) is not None:
            number += 1
            where = f"{path}: record {number}"
            yield Document("", where, _ids(record, feature, where))


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli, RFC 3720), computed with NumPy."""
    table, state = _crc_table(), 0xFFFFFFFF
    values = np.frombuffer(data, np.uint8)
    for start in range(0, len(values), CRC_BLOCK_BYTES):
        block = values[start : start + CRC_BLOCK_BYTES]
        # A CRC is linear: the state counts as four bytes more in front of the zeros that follow,
        # and every byte contributes independently, by its distance to the end of the block.
        rows = np.arange(len(block) - 1, -1, -1)
        head = np.frombuffer(struct.pack("<I", state), np.uint8)
        mixed = block.copy()
        mixed[:4] ^= head[: len(mixed)]
        rest = state >> 8 * min(4, len(mixed))
        state = int(np.bitwise_xor.reduce(table[rows, mixed])) ^ rest
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


@cache
def _crc_table() -> np.ndarray:
    """uint32 [distance, byte]: what a byte adds to the CRC, `distance` bytes before the end."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(_POLYNOMIAL), first >> 1)
    rows = [first]
    for _ in range(CRC_BLOCK_BYTES - 1):
        rows.append(first[rows[-1] & 0xFF] ^ rows[-1] >> np.uint32(8))
    return np.stack(rows)


def _next_record(stream: BufferedIOBase, where: str) -> bytes | None:
    """The data of the next record; None at the end of the file."""
    head = stream.read(12)
    if not head:
        return None
    if len(head) < 12:
        _refuse(where, "the file ends inside it")
    length, checksum = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != checksum:
        _refuse(where, "the checksum of its length is wrong")
    if length > MAX_RECORD_BYTES:
        _refuse(where, f"{length} bytes long, the limit is {MAX_RECORD_BYTES}")
    data = stream.read(length + 4)
    if len(data) < length + 4:
        _refuse(where, "the file ends inside it")
    data, checksum = data[:-4], int.from_bytes(data[-4:], "little")
    if masked_crc32c(data) != checksum:
        _refuse(where, "the checksum of its data is wrong")
    return data


def _ids(record: bytes, feature: str, where: str) -> np.ndarray:
    """uint32 [ids] of tf.train.Example: features (1) -> map entries (1): key (1), value (2)."""
    found: dict[str, memoryview] = {}
    for features in _messages(memoryview(record), 1, where):
        for entry in _messages(features, 1, where):
            key = b"".join(_messages(entry, 1, where))
            values = [*_messages(entry, 2, where)]
            found[key[:1000].decode(errors="replace")] = values[-1] if values else memoryview(b"")
    if feature not in found:
        raise DataError(
            f"{where}: no feature {shown(feature)}; it has {names(found)}; name one with "
            "--text-field"
        )
    # Feature: bytes_list (1), float_list (2) or int64_list (3), which has the values (1).
    lists = [*_messages(found[feature], 3, where)]
    if not lists:
        raise DataError(f"{where}: feature {shown(feature)} is not a list of int64 token ids")
    parts = [_varints(part, where) for group in lists for part in _int64_values(group, where)]
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    if len(ids) and int(ids.max()) >= 1 << 32:
        raise DataError(f"{where}: feature {shown(feature)} holds numbers that are no token ids")
    return ids.astype(np.uint32)


def _int64_values(group: memoryview, where: str) -> Iterator[memoryview]:
    """The varints of field 1: packed together, or each a field of its own."""
    for number, wire, value in _fields(group, where):
        if number == 1 and wire in (_VARINT, _BYTES):
            yield value


def _messages(data: memoryview, number: int, where: str) -> Iterator[memoryview]:
    """The contents of the length-delimited fields with this number."""
    for found, wire, value in _fields(data, where):
        if found == number and wire == _BYTES:
            yield value


def _fields(data: memoryview, where: str) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of a message: number, wire type, content (of a varint: its own bytes)."""
    at = count = 0
    while at < len(data):
        tag, at = _varint(data, at, where)
        number, wire = tag >> 3, tag & 7
        start = at
        if wire == _VARINT:
            at = _varint(data, at, where)[1]
        elif wire == _BYTES:
            size, start = _varint(data, at, where)
            at = start + size
        elif wire in _FIXED_BYTES:
            at += _FIXED_BYTES[wire]
        else:
            _refuse(where, f"its data has a field of unknown type {wire}")
        count += 1
        if at > len(data) or count > MAX_FIELDS or not number:
            _refuse(where, "its data is no tf.train.Example")
        yield number, wire, data[start:at]


def _varint(data: memoryview, at: int, where: str) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the position behind it."""
    value = 0
    for i, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    return _refuse(where, "its data has a number without an end")


def _varints(data: memoryview, where: str) -> np.ndarray:
    """uint64: all numbers of a packed list at once."""
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values < 0x80)
    if len(values) and (not len(ends) or ends[-1] != len(values) - 1):
        _refuse(where, "its data has a number without an end")
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    lengths = ends + 1 - starts
    if lengths.max(initial=0) > MAX_VARINT_BYTES:
        _refuse(where, "its data has a number without an end")
    if not len(values):
        return np.empty(0, np.uint64)
    place = np.arange(len(values)) - np.repeat(starts, lengths)
    bits = (values & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, starts)


def _refuse(where: str, reason: str) -> NoReturn:
    raise DataError(f"{where}: damaged ({reason}); fetch the file again, or leave it out")
