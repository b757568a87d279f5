"""A state dict that reads one tensor at a time, so that a model larger than memory converts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openpalm.checkpoint import tensors
from openpalm.errors import CheckpointError


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def joined_rows(
    shape: tuple[int, ...], dtype: torch.dtype, parts: Sequence[tuple[slice, LazyTensor]]
) -> LazyTensor:
    """A tensor made of parts, each in its rows; zeros elsewhere."""

    def read() -> Tensor:
        if len(parts) == 1 and parts[0][1].shape == shape:
            return parts[0][1].read()
        whole = torch.zeros(shape, dtype=dtype)
        for rows, part in parts:
            whole[rows] = part.read()
        return whole

    return LazyTensor(shape, dtype, read)


class LazyState(Mapping[str, Tensor]):
    """Names -> tensors, read on access and not kept. `where` is the path for messages."""

    def __init__(self, where: Path, entries: Mapping[str, LazyTensor]):
        self.where = where
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        """Reads a tensor. Raises CheckpointError if a number is NaN or infinite."""
        tensor = self.entries[name].read()
        tensors.check_finite(self.where, {name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def rounded(self, dtype: torch.dtype) -> "LazyState":
        """The same tensors in `dtype`.

        Reading one raises CheckpointError if a number exceeds the range of `dtype`.
        """

        def entry(name: str, old: LazyTensor) -> LazyTensor:
            def read() -> Tensor:
                tensor = self[name].to(dtype)
                if not tensors.is_finite(tensor):
                    raise CheckpointError(
                        f"{self.where}: {name} exceeds the range of {str(dtype)[6:]}; "
                        "take bfloat16 or float32"
                    )
                return tensor

            return LazyTensor(old.shape, dtype, read)

        return LazyState(self.where, {n: entry(n, old) for n, old in self.entries.items()})

    def copied_to(self, put: Callable[[str, Tensor], None]) -> "LazyState":
        """The same tensors; each is also given to `put` when it is read."""

        def entry(name: str, old: LazyTensor) -> LazyTensor:
            def read() -> Tensor:
                tensor = self[name]
                put(name, tensor)
                return tensor

            return LazyTensor(old.shape, old.dtype, read)

        return LazyState(self.where, {n: entry(n, old) for n, old in self.entries.items()})

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor; reads none."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}

    @classmethod
    def of_file(cls, path: Path, prefix: str = "") -> "LazyState":
        """The floating-point tensors of a safetensors file with this prefix, named without it.

        Each read opens the file, so that no page of it stays mapped.
        """
        with tensors.opened(path) as file:
            shapes, dtypes = file.shapes(), file.floating()

        def entry(name: str) -> LazyTensor:
            def read() -> Tensor:
                with tensors.opened(path) as file:
                    return file.tensor(name).clone()

            return LazyTensor(shapes[name], dtypes[name], read)

        names = [name for name in dtypes if name.startswith(prefix)]
        return cls(path, {name.removeprefix(prefix): entry(name) for name in names})
