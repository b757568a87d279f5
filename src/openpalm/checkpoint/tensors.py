"""Named tensors in a directory, as torch.distributed.checkpoint lays them out; tensors only.

The layout reshards on load, so one process or many write and read it. Its index is a pickle and
it would unpickle anything that is not a tensor: here the index is read through an allow-list of
data types, and what is not a tensor is refused.
"""

import contextlib
import errno
import io
import math
import os
import pickle
import re
import warnings
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from openpalm.base.json_file import read_failure
from openpalm.base.pickle_check import check_pickle
from openpalm.errors import CheckpointError

MAX_INDEX_BYTES = 64 << 20


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the tensors into an existing directory, files forced to disk."""
    with _alone():
        writer = FileSystemWriter(folder, thread_count=1)
        state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=True)


def read(folder: Path, listed: Container[str]) -> dict[str, Tensor]:
    """All tensors of the directory, from the `listed` files alone.

    Raises CheckpointError for anything `write` does not write, StorageError where reading fails.
    """
    reader = _Reader(folder, listed)
    index = reader.read_metadata().state_dict_metadata
    try:
        tensors: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in index.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with _alone():
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # an index that lies fails in many ways
        failed = cause(error)
        if not isinstance(failed, Exception):
            raise failed from None
        if isinstance(failed, OSError):
            raise read_failure(folder, failed) from None
        reason = str(failed).partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read ({reason})") from None
    return tensors


class _Reader(FileSystemReader):
    """Reads DCP's index through an allow-list, and accepts tensors only.

    The index is a pickle and non-tensor entries are unpickled, so a foreign directory could run
    code; see docs on safety of files.
    """

    def __init__(self, folder: Path, listed: Container[str]):
        super().__init__(folder)
        self.listed = listed

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        where = Path(self.path) / ".metadata"
        try:
            content = _bounded(where)
            check_pickle(content)
            content.seek(0)
            metadata = _IndexUnpickler(content).load()
            wrong = _wrong_in_index(metadata, where.parent, self.listed)
            metadata.storage_meta.load_id = self.load_id
        except OSError as error:
            raise read_failure(where, error) from None
        except Exception as error:  # a damaged pickle fails in many ways
            raise CheckpointError(f"{where}: not an index of tensors ({error})") from None
        if wrong:
            raise CheckpointError(f"{where}: {wrong}; it was not written here")
        return metadata


def _bounded(path: Path) -> io.BytesIO:
    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise ValueError(f"{size:,} bytes, an index has at most {MAX_INDEX_BYTES:,}")
    return io.BytesIO(path.read_bytes())


def _wrong_in_index(metadata: Metadata, folder: Path, listed: Container[str]) -> str | None:
    """Why an index is not to be followed, or None."""
    everything = metadata.state_dict_metadata.values()
    entries = [entry for entry in everything if isinstance(entry, TensorStorageMetadata)]
    if len(entries) != len(everything):
        return "holds more than tensors"
    if any("/" in info.relative_path for info in metadata.storage_data.values()):
        return "points outside its directory"
    for name in (".metadata", *(info.relative_path for info in metadata.storage_data.values())):
        if name not in listed:
            return f"the manifest does not list {name}"
    if any(sum(math.prod(c.sizes) for c in e.chunks) != math.prod(e.size) for e in entries):
        return "holds parts of tensors"
    wanted = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in entries)
    if wanted > sum(file.stat().st_size for file in folder.iterdir()):
        return f"promises {wanted:,} bytes of tensors, more than its files hold"
    return None


class _IndexUnpickler(pickle.Unpickler):
    _ALLOWED: ClassVar = {
        "pathlib": "PosixPath WindowsPath",
        "pathlib._local": "PosixPath WindowsPath",
        "torch": "Size float64 float32 float16 bfloat16 int64 int32 uint8 bool",
        "torch.serialization": "_get_layout",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.distributed.checkpoint.metadata": "Metadata TensorStorageMetadata TensorProperties "
        "ChunkStorageMetadata MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ALLOWED.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """DCP warns that no process group exists; with one process that is what we mean."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def cause(error: BaseException) -> BaseException:
    """What failed: DCP wraps everything, an interrupt too, once a rank."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def refusal(error: BaseException) -> str | None:
    """Why the system refused a write, if that is what the error says."""
    if isinstance(error, OSError):
        return error.strerror
    if said := re.search(r"os error (\d+)", str(error)):  # safetensors
        return os.strerror(int(said[1]))
    if re.search("PytorchStreamWriter|unexpected pos", str(error)):  # torch.save on a full disk
        return os.strerror(errno.ENOSPC)
    return None
