"""Writes and reads safetensors files, and checks tensors for numbers that are not finite.

Nothing in such a file is executed. torch.distributed.checkpoint reads the same files
(HuggingFaceStorageReader), so several processes can load a checkpoint of one process.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from openpalm.base.json_file import read_failure
from openpalm.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""floating-point types of a safetensors file"""
_OTHER_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NOT_FINITE = "holds numbers that are not finite"
_REMEDY = "take an older checkpoint or another copy"


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors from any device; tensors that share memory are each written in full."""
    stored: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses two views of one memory, such as a column given under two names.
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    safetensors.torch.save_file(stored, path, metadata=metadata)


Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor of a file."""


def header(
    layout: Layout, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where each tensor begins in it."""
    codes = {dtype: code for code, dtype in (DTYPES | _OTHER_DTYPES).items()}
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name, (shape, dtype) in layout.items():
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [starts[name], end]
        fields[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to eight bytes
    first = 8 + len(text)
    starts = {name: first + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, starts


@contextmanager
def filled(
    path: Path, layout: Layout, metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """A new safetensors file, filled by calls with a name and its tensor, in any order.

    One tensor is in memory at a time. A second call for a name does nothing. Raises OSError.
    """
    text, offsets = header(layout, metadata)
    missing = set(layout)
    with path.open("wb") as file:
        file.write(text)

        def put(name: str, tensor: Tensor) -> None:
            if name not in missing:
                return
            if (tuple(tensor.shape), tensor.dtype) != layout[name]:
                raise AssertionError(
                    f"{name}: {list(tensor.shape)} {tensor.dtype}, not as declared"
                )
            file.seek(offsets[name])
            file.write(raw_bytes(tensor.contiguous()))
            missing.remove(name)

        yield put
        if missing:
            raise AssertionError(f"{path}: {min(missing)} was not written")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU: bytes to write, or to read into."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # pyright: ignore


def refusal(error: BaseException) -> str | None:
    """The system's reason for refusing a write, or None for other errors."""
    if isinstance(error, OSError):
        return error.strerror
    said = re.search(r"os error (\d+)", str(error))  # safetensors reports system errors as text
    return os.strerror(int(said[1])) if said else None


@contextmanager
def opened(path: Path) -> Iterator["TensorFile"]:
    """Opens a file. Raises CheckpointError if it is damaged, StorageError if reading fails."""
    try:
        # safetensors reports every refusal of the system as a missing file.
        with path.open("rb"):
            pass
        with safetensors.safe_open(path, framework="pt") as file:
            yield TensorFile(path, file)
    except OSError as error:
        raise read_failure(path, error) from None
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def check_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming the tensor, if a number is NaN or infinite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{where}: {name} {_NOT_FINITE}; {_REMEDY}")


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. aminmax returns NaN if there is one; one pass, no copy."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


class TensorFile:
    def __init__(self, path: Path, file: Any):
        self.path = path
        self._file = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name; no tensor is read."""
        return {n: tuple(self._file.get_slice(n).get_shape()) for n in list(self._file.keys())}

    def floating(self) -> dict[str, torch.dtype]:
        """Data type of each floating-point tensor by name; no tensor is read."""
        names = {n: self._file.get_slice(n).get_dtype() for n in list(self._file.keys())}
        return {name: DTYPES[code] for name, code in names.items() if code in DTYPES}

    def tensor(self, name: str) -> Tensor:
        """The tensor. Raises SafetensorError, which `opened` translates, if there is none."""
        return self._file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor, which is not read. Raises SafetensorError if there is none."""
        return tuple(self._file.get_slice(name).get_shape())

    def finite(
        self,
        name: str,
        allow: Callable[[str], None] | None = None,
        part: tuple[slice, ...] = (),
    ) -> Tensor:
        """The tensor, or a part of it. Raises CheckpointError if a number is NaN or infinite.

        With `allow` it is returned all the same, and `allow` gets the message.
        """
        tensor = self._file.get_slice(name)[part] if part else self.tensor(name)
        if allow is None:
            check_finite(self.path, {name: tensor})
        elif not is_finite(tensor):
            allow(f"{self.path}: {name} {_NOT_FINITE}")
        return tensor


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for.

    They are memory-mapped: if the file changes they change too, or end the process.
    """

    def __init__(self, path: Path):
        self._path = path
        with opened(path) as file:
            self._names = list(file.shapes())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with opened(self._path) as file:
            return file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
