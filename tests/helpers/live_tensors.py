"""Counts the bytes of all tensors that live at once, for tests of memory."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from openpalm.model.sharding import local_part


class LiveTensors(TorchDispatchMode):
    """Follows the storages of the results of all operations inside it; `peak` is in bytes.

    Temporary memory inside an operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, StorageWeakRef] = {}

    def add(self, tensor: torch.Tensor) -> None:
        # The storage of a DTensor itself has the size of the whole tensor, and no memory.
        reference = StorageWeakRef(local_part(tensor).untyped_storage())
        known = self._alive.get(reference.cdata)
        if known is None or known.expired():
            self._alive[reference.cdata] = reference

    def bytes(self) -> int:
        """Bytes of the storages that are alive now."""
        total, alive = 0, {}
        for key, reference in self._alive.items():
            # The size is that of now: FSDP empties storages and fills them again.
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                total += storage.nbytes()
                alive[key] = reference
        self._alive = alive
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for found in tree_iter(out):
            if isinstance(found, torch.Tensor):
                self.add(found)
        self.peak = max(self.peak, self.bytes())
        return out
