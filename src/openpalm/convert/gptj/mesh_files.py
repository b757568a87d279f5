"""Reads arrays of mesh-transformer-jax's npz files with numpy: nothing is unpickled or unpacked.

Type, shape and size of an array are checked before a byte of its numbers is read.
"""

import ast
import os
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from openpalm.base.console import shown
from openpalm.checkpoint.tensors import raw_bytes
from openpalm.convert.gptj.mesh_layout import FILES, places_of
from openpalm.errors import CheckpointError

_MAX_HEADER_BYTES = 1 << 12
_CHUNK_BYTES = 1 << 24
# numpy has no bfloat16: jax leaves two bytes without a type.
_TYPES = {
    "<f4": torch.float32,
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
    "<f2": torch.float16,
    "<i4": torch.int32,
    "<u4": torch.uint32,
}
_HEADER = re.compile(
    rb"\{'descr': '([<|]\w\d)', 'fortran_order': (True|False), 'shape': (\([\d, ]*\)), ?\}\s*"
)


class Shard:
    """The files 0.npz to 15.npz of one shard, as a list of arrays."""

    def __init__(self, folder: Path):
        self.folder = folder
        members = [_members(self.file(number)) for number in range(FILES)]
        self.checksums = {
            f"{folder.name}/{number}.npz": " ".join(f"{entry.CRC:08x}" for entry in entries)
            for number, entries in enumerate(members)
        }
        sizes = [len(entries) for entries in members]
        self.count = sum(sizes)
        self._places = places_of(self.count)
        expected = [sum(file == number for file, _ in self._places) for number in range(FILES)]
        if sizes != expected:
            raise CheckpointError(
                f"{folder}: its files hold {sizes} arrays, where {expected} belong; one is of "
                "another checkpoint, or incomplete"
            )

    def file(self, number: int) -> Path:
        return self.folder / f"{number}.npz"

    def dtype(self, leaf: int) -> torch.dtype:
        file, index = self._places[leaf]
        with _opened(self.file(file)) as archive, _member(archive, index) as stream:
            return _header(stream, self.file(file), index)[0]

    def read(self, leaf: int, shape: tuple[int, ...]) -> Tensor:
        """The array of a leaf, which must have this shape."""
        file, index = self._places[leaf]
        path = self.file(file)
        with _opened(path) as archive:
            entry = archive.getinfo(f"arr_{index}.npy")
            with _member(archive, index) as stream:
                dtype, fortran, found = _header(stream, path, index)
                if found != shape:
                    raise CheckpointError(
                        f"{path}: arr_{index} is {list(found)} where this config needs "
                        f"{list(shape)}; another config belongs to it, or another number of shards"
                    )
                whole = torch.empty(shape[::-1] if fortran else shape, dtype=dtype)
                flat = raw_bytes(whole)
                if entry.file_size - stream.tell() != len(flat):
                    raise CheckpointError(f"{path}: arr_{index} has another size than it declares")
                try:
                    _fill(stream, flat)
                except (EOFError, OSError, zipfile.BadZipFile) as error:
                    raise CheckpointError(f"{path}: arr_{index} is damaged ({error})") from None
        return whole.permute(*range(len(shape))[::-1]) if fortran else whole


def _fill(stream: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        read = stream.readinto(target[done : done + _CHUNK_BYTES])  # pyright: ignore
        if not read:
            raise EOFError("it ends early")
        done += read
    if stream.read(1):  # also makes zipfile compare the checksum
        raise EOFError("it goes on after its end")


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; every shard has 0.npz to 15.npz") from None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is not a whole npz file ({error})") from None


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The arrays of a file, which must be arr_0, arr_1, ... and not be compressed."""
    with _opened(path) as archive:
        entries = archive.infolist()
    expected = [f"arr_{index}.npy" for index in range(len(entries))]
    if sorted(entry.filename for entry in entries) != sorted(expected):
        names = ", ".join(shown(entry.filename) for entry in entries[:3])
        raise CheckpointError(f"{path}: holds {names}, where arr_0.npy, arr_1.npy, ... belong")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: is compressed, which mesh-transformer-jax never does")
    # Stored entries cannot take more bytes than the file has, unless they overlap.
    if sum(entry.file_size for entry in entries) > os.stat(path).st_size:
        raise CheckpointError(f"{path}: its arrays claim more bytes than the file has")
    return entries


def _member(archive: zipfile.ZipFile, index: int) -> BinaryIO:
    try:
        return archive.open(f"arr_{index}.npy")  # pyright: ignore[reportReturnType]
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{archive.filename}: arr_{index} is damaged ({error})") from None


def _header(stream: BinaryIO, path: Path, index: int) -> tuple[torch.dtype, bool, tuple[int, ...]]:
    """Type, order and shape of an array in numpy's format; leaves the stream at its numbers."""
    try:
        version = np.lib.format.read_magic(stream)
        length_bytes = {(1, 0): 2, (2, 0): 4, (3, 0): 4}[version]
        length = int.from_bytes(stream.read(length_bytes), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        header = _HEADER.fullmatch(stream.read(length))
        if header is None:
            raise ValueError("its header is not one of numpy")
        shape = ast.literal_eval(header[3].decode())
        return _TYPES[header[1].decode()], header[2] == b"True", tuple(shape)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: arr_{index} holds {error.args[0]}, which is no type of a checkpoint"
        ) from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: arr_{index} is no array ({error})") from None


def write_header(stream: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The header of an array as mesh-transformer-jax writes it."""
    code = next(code for code, known in _TYPES.items() if known == dtype)
    header = {"descr": code, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
