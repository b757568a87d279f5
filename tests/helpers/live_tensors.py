"""Counts the bytes of all tensors that live at once, for tests of memory."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Follows the storages of the results of all operations inside it; `peak` is in bytes.

    Temporary memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        known = self._alive.get(reference.cdata)
        if known is None or known[0].expired():
            self._alive[reference.cdata] = (reference, storage.nbytes())

    def bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in tree_iter(out):
            if isinstance(found, torch.Tensor):
                self.add(found)
        self.peak = max(self.peak, self.bytes())
        return out
