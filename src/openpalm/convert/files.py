"""Opens what other projects saved, without running any of it.

Gives tensors that are surely backed by bytes of the file, and hyperparameters whose types and
ranges were checked. Knows no project's key names.
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
from openpalm.base.pickle_check import check_pickle
from openpalm.errors import CheckpointError, count_of

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
PREFIXES = ("_orig_mod.", "module.", "model.", "net.")
_MAX_JSON_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 64 << 20
# torch's older form: a magic number, a version, the machine, the content, the storages' names.
_LEGACY_PICKLES = 5
_MAX_WHOLE = 1 << 31


class PaLMConfig:
    """Inert stand-in for nanoPALM's pickled `model.PaLMConfig`: keeps the state as data."""

    fields: object = None

    def __setstate__(self, state: object) -> None:
        self.fields = state


class Tensors:
    """A state dict that is used up name by name, so that nothing in it is ignored silently."""

    def __init__(self, where: Path, tensors: dict[str, Tensor]):
        self.where = where
        self._left = dict(tensors)
        self.names = frozenset(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must exist with so many dimensions, none of them empty."""
        tensor = self._left.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.where}: holds no {name}; the file is incomplete")
        if tensor.dim() != dims or not tensor.numel():
            raise CheckpointError(f"{self.where}: {name} is {list(tensor.shape)}, not {dims}-d")
        return tuple(tensor.shape)

    def peek(self, name: str) -> Tensor:
        """A vector in float32, left for `take`."""
        self.shape(name, 1)
        return self._left[name].float()

    def take(self, name: str, *shape: int) -> Tensor:
        """That tensor in float32, its shape and numbers checked; it counts as used."""
        found = self.shape(name, len(shape))
        if found != shape:
            raise CheckpointError(
                f"{self.where}: {name} is {list(found)} where the other tensors say {list(shape)}"
            )
        # A copy: what the file maps would change, or vanish, with the file.
        tensor = self._left.pop(name).to(torch.float32, copy=True)
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.where}: {name} holds infinite or undefined numbers")
        return tensor

    def take_known(self, name: str, expected: Tensor) -> None:
        """A saved buffer, if it is there, which must be `expected` up to half precision."""
        if name not in self:
            return
        stored = self.take(name, *expected.shape)
        if not torch.allclose(stored, expected, rtol=0.01, atol=1e-4):
            raise CheckpointError(
                f"{self.where}: {name} is not what the original computes; it was altered, "
                "or another version of that project wrote it"
            )

    def drop(self, pattern: str) -> list[str]:
        """Removes the names that match; returns them."""
        names = [name for name in self._left if re.match(pattern, name)]
        for name in names:
            del self._left[name]
        return names

    def under(self, prefix: str) -> "Tensors":
        """The tensors whose names begin so, without it; they count as used here."""
        names = [name for name in self._left if name.startswith(prefix)]
        moved = {name.removeprefix(prefix): self._left.pop(name) for name in names}
        return Tensors(self.where, moved)

    def left(self) -> dict[str, Tensor]:
        """What nobody took so far."""
        return dict(self._left)

    def finish(self) -> None:
        """Refuses what nobody took."""
        if self._left:
            shown = ", ".join(sorted(self._left)[:3])
            tensors = count_of(len(self._left), "tensor")
            raise CheckpointError(
                f"{self.where}: holds {tensors} that this kind of model "
                f"does not have ({shown:.120}); it is another model, or a newer version of it"
            )


class Hyperparameters:
    """The values of a foreign config.json; whole numbers are checked for type and range."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where = where
        self.values = values

    def whole(self, name: str) -> int | None:
        """A count, or None where the file does not say."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or not 0 < value < _MAX_WHOLE:
            raise CheckpointError(f"{self.where}: {name} cannot be {value!r}; give a whole number")
        return value

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
        """Refuses a value that contradicts what the tensors say."""
        for name, size in found.items():
            said = self.values.get(name)
            if type(size) is int:
                said = self.whole(name)
            if said is not None and said != size:
                raise CheckpointError(
                    f"{self.where}: {name} is {said!r:.40}, but the tensors say {size}; "
                    "correct or remove it, or give another file with --config"
                )


def find_file(source: Path) -> Path:
    """The checkpoint file that `source`, a file or a folder holding exactly one, stands for."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such file or folder; check the path")
    found = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not found:
        raise CheckpointError(f"{source}: holds no checkpoint file ({', '.join(SUFFIXES)})")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{source}: holds several checkpoint files, name one: {names}")
    return found[0]


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The state dict in a file, without wrappers and prefixes, and what was saved around it.

    Raises CheckpointError for anything but names and dense tensors held by the file itself.
    """
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    around: dict[str, Any] = {}
    for _ in WRAPPERS:
        inside = next((name for name in WRAPPERS if _is_mapping(content, name)), None)
        if inside is None:
            break
        around |= {key: value for key, value in content.items() if key != inside}
        content = content[inside]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no state dict; save the model's state_dict() again")
    tensors = _bare(path, content)
    _check_backing(path, tensors)
    return Tensors(path, tensors), around


def read_hyperparameters(config: Path | None, checkpoint: Path) -> Hyperparameters:
    """--config, else the config.json beside the checkpoint, else nothing said."""
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
    # Whatever bytes a stranger chose to write can surface as any exception of the reader.
    except Exception as error:
        raise CheckpointError(f"{path}: {_why(error)}") from None


def _check_zip(path: Path) -> None:
    """torch stores its records uncompressed: more content than file is a zip bomb."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise CheckpointError(f"{path}: unpacks to more bytes than it has; torch.save did not")

        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                _refuse_long(path, entry.file_size)
                _check(path, io.BytesIO(archive.read(entry)))


def _check_legacy(path: Path) -> None:
    """The pickles at the beginning of the file; the tensors' bytes follow them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(_LEGACY_PICKLES):
            if content.tell() == len(content):
                break
            _check(path, content)
            _refuse_long(path, content.tell())


def _refuse_long(path: Path, size: int) -> None:
    if size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: {size:,} bytes of pickle are no checkpoint; nothing was run"
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
            f"asks for {wanted[1]}, which no checkpoint needs; nothing of it was executed. "
            "If you trust it, save its bare state_dict() again"
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
            raise CheckpointError(f"{path}: {name!s:.60} is no tensor; save the bare state_dict()")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {name} is {value.dtype}, not plain floating point")
    names = list(content)
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in names)), None):
        content = {name.removeprefix(prefix): value for name, value in content.items()}
        names = list(content)
    return content


def _check_backing(path: Path, tensors: dict[str, Tensor]) -> None:
    """A few bytes can claim any shape through zero strides, or one storage under many names."""
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims more numbers than the file holds")
    # TiedRow tables appear twice; nothing else shares.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors claim more bytes than the file has")
