"""Reads checkpoint files of other projects safely: no code in a file is executed.

Returns tensors that the bytes of the file back, and hyperparameters with checked types and ranges.
Knows no project's tensor names.
"""

import io
import math
import mmap
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from openpalm.base.json_file import read_json
from openpalm.convert.pickle_check import check_pickle
from openpalm.errors import CheckpointError, count_of

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
PREFIXES = ("_orig_mod.", "module.", "model.", "net.")
_MAX_JSON_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 64 << 20
# torch's older format: magic number, version, machine, content, names of the storages.
_LEGACY_PICKLES = 5
_MAX_WHOLE = 1 << 31


class PaLMConfig:
    """Replaces nanoPALM's pickled `model.PaLMConfig`: keeps its state as data."""

    fields: object = None

    def __setstate__(self, state: object) -> None:
        self.fields = state


class Tensors:
    """A state dict that is consumed name by name; `finish` raises if a tensor was not used."""

    def __init__(self, where: Path, tensors: dict[str, Tensor]):
        self.where = where
        self._left = dict(tensors)
        self.names = frozenset(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must exist, be not empty and have `dims` dimensions."""
        tensor = self._left.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: holds no {name}; the file is incomplete")
        if tensor.dim() != dims or not tensor.numel():
            raise CheckpointError(f"{self.where}: {name} is {list(tensor.shape)}, not {dims}-d")
        return tuple(tensor.shape)

    def peek(self, name: str) -> Tensor:
        """A vector in float32; it stays for `take`."""
        self.shape(name, 1)
        return self._left[name].float()

    def take(self, name: str, *shape: int) -> Tensor:
        """Removes a tensor and returns it in float32, with shape and numbers checked."""
        found = self.shape(name, len(shape))
        if found != shape:
            raise CheckpointError(
                f"{self.where}: {name} is {list(found)} where the other tensors say {list(shape)}"
            )
        # A copy: a memory-mapped tensor would change with the file.
        tensor = self._left.pop(name).to(torch.float32, copy=True)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.where}: {name} holds infinite or undefined numbers")
        return tensor

    def take_known(self, name: str, expected: Tensor) -> None:
        """Removes a saved buffer, if present; it must equal `expected` up to half precision."""
        if name not in self:
            return
        stored = self.take(name, *expected.shape)
        if not torch.allclose(stored, expected, rtol=0.01, atol=1e-4):
            raise CheckpointError(
                f"{self.where}: {name} differs from the value that the project computes; the "
                "file was altered, or written by another version"
            )

    def drop(self, pattern: str) -> list[str]:
        """Removes the names that match `pattern`; returns them."""
        names = [name for name in self._left if re.match(pattern, name)]
        for name in names:
            del self._left[name]
        return names

    def under(self, prefix: str) -> "Tensors":
        """Moves the tensors with this prefix to a new Tensors, without the prefix."""
        names = [name for name in self._left if name.startswith(prefix)]
        moved = {name.removeprefix(prefix): self._left.pop(name) for name in names}
        return Tensors(self.where, moved)

    def left(self) -> dict[str, Tensor]:
        """The tensors that are not used yet."""
        return dict(self._left)

    def finish(self) -> None:
        """Raises CheckpointError if tensors were not used."""
        if self._left:
            shown = ", ".join(sorted(self._left)[:3])
            tensors = count_of(len(self._left), "tensor")
            raise CheckpointError(
                f"{self.where}: holds {tensors} that this kind of model "
                f"does not have ({shown:.120}); it is another model, or a newer version of it"
            )


class Hyperparameters:
    """The values of a foreign config.json; reading one checks its type and range."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where = where
        self.values = values

    def whole(self, name: str) -> int | None:
        """A positive whole number, or None if the file does not have it."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 < value < _MAX_WHOLE:
            raise CheckpointError(f"{self.where}: {name} cannot be {value!r}; give a whole number")
        return value

    def required(self, *names: str, remedy: str) -> list[int]:
        """Positive whole numbers that the file must have."""
        if missing := [name for name in names if self.whole(name) is None]:
            raise CheckpointError(f"{self.where}: lacks {', '.join(missing)}; {remedy}")
        return [self.whole(name) or 0 for name in names]

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise CheckpointError(f"{self.where}: {name} cannot be {value!r}; give true or false")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(f"{self.where}: {name} cannot be {value!r}; give a number > 0")
        return float(value)

    def agree(self, **found: float) -> None:
        """Raises CheckpointError for a value that contradicts the tensors."""
        for name, size in found.items():
            said = self.values.get(name)
            if type(size) is int:
                said = self.whole(name)
            if said is not None and said != size:
                raise CheckpointError(
                    f"{self.where}: {name} is {said!r:.40}, but the tensors say {size}; "
                    "correct or remove it, or give another file with --config"
                )


def find_file(path: Path) -> Path:
    """The checkpoint file `path`, or the only checkpoint file in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        hub = (
            ", or download a model of the Hugging Face Hub first "
            "(hf download ACCOUNT/NAME --local-dir FOLDER)"
        )
        hint = "" if path.suffix in SUFFIXES else hub
        raise CheckpointError(f"{path}: no such file or folder; check the path{hint}")
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint file ({', '.join(SUFFIXES)})")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds several checkpoint files, name one: {names}")
    return found[0]


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The state dict in a file, without wrappers and prefixes, and the values outside of it.

    Raises CheckpointError for anything but names and dense tensors with bytes in the file.
    """
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    outside: dict[str, Any] = {}
    for _ in WRAPPERS:
        inside = next((name for name in WRAPPERS if _is_mapping(content, name)), None)
        if inside is None:
            break
        outside |= {key: value for key, value in content.items() if key != inside}
        content = content[inside]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no state dict; save the model's state_dict() again")
    tensors = _bare(path, content)
    _check_backing(path, tensors)
    return Tensors(path, tensors), outside


def read_hyperparameters(config: Path | None, checkpoint: Path) -> Hyperparameters:
    """Those in `config`, else in config.json in the checkpoint's folder, else none."""
    path = config or checkpoint.parent / "config.json"
    if config is None and not path.is_file():
        return Hyperparameters(str(path), {})
    remedy = "check the path that --config gives"
    return Hyperparameters(str(path), read_json(path, remedy, _MAX_JSON_BYTES))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> object:
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_zip(path)
        else:
            _check_legacy(path)
        stand_in: Any = (PaLMConfig, "model.PaLMConfig")
        with warnings.catch_warnings(), torch.serialization.safe_globals([stand_in]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (CheckpointError, PermissionError):
        raise
    # The bytes of an unknown file can cause any exception in the reader.
    except Exception as error:
        raise CheckpointError(f"{path}: {_why(error)}") from None


def _check_zip(path: Path) -> None:
    """torch does not compress: a zip file with more content than its own size is a zip bomb."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path}: unpacks to more bytes than it has; torch.save did not")

        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                _check_pickle_size(path, entry.file_size)
                _check(path, io.BytesIO(archive.read(entry)))


def _check_legacy(path: Path) -> None:
    """Checks the pickles at the start of the file; the bytes of the tensors follow them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_LEGACY_PICKLES):
            if content.tell() == len(content):
                break
            _check(path, content)
            _check_pickle_size(path, content.tell())


def _check_pickle_size(path: Path, size: int) -> None:
    if size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: its pickle of {size:,} bytes is too large; nothing was executed"
        )


def _check(path: Path, content: io.BytesIO | mmap.mmap) -> None:
    try:
        check_pickle(content)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not a checkpoint that can be read safely: its pickle "
            f"{str(error)[:100]}; nothing in it was executed"
        ) from None


def _why(error: Exception) -> str:
    wanted = re.search(r"GLOBAL (?:__builtin__\.)?([\w.]+)", str(error))
    if wanted:
        return (
            f"asks for {wanted[1]}, which no checkpoint needs; nothing in it was executed. "
            "If you trust the file, save its state_dict() again, without anything else"
        )
    return (
        "is not a checkpoint that torch can read safely "
        f"({type(error).__name__}); nothing in it was executed"
    )


def _is_mapping(content: object, name: str) -> bool:
    return isinstance(content, dict) and isinstance(content.get(name), dict)


def _bare(path: Path, content: dict[Any, Any]) -> dict[str, Tensor]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!s:.60} is no tensor; save the state_dict() alone")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {name} is {value.dtype}, not plain floating point")
    names = list(content)
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in names)), None):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
        names = list(content)
    return content


def _check_backing(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuses tensors larger than the file, through zero strides or a storage with many names."""
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims more numbers than the file holds")
    # Only tied tables share a storage, between two names.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors claim more bytes than the file has")
