"""Saves checkpoints of a run on several processes, in the background while training goes on.

A save copies this process's parts to the CPU's memory; a thread writes them (parts.py) with a
process group of its own, because two threads must not share one. The main process writes the small
files and the manifest last, so that the directory is complete or absent.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpalm.checkpoint import tensors
from openpalm.checkpoint.contents import Contents, complete_or_absent
from openpalm.checkpoint.parts import Part, snapshot, write_parts
from openpalm.errors import StorageError
from openpalm.parallel.world import World

_Files = dict[str, dict[str, Part]]


class Saver:
    """Saves one checkpoint at a time; an error appears at the next call, on every process."""

    def __init__(self, world: World):
        self._world = replace(world, control=world.saving, patient=world.saving)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be saved; `wait` raises the error."""
        return self._error is not None

    def save(
        self,
        directory: Path,
        contents: Contents,
        lineage: dict[str, Any],
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Begins to write a checkpoint; `then` runs on the main process once it is complete.

        Waits for the checkpoint before it. A single process writes at once. Raises StorageError.
        """
        self.wait()
        if self._world.size == 1:
            with complete_or_absent(directory, lineage) as partial:
                contents.write(partial)
            then()
            return
        files = {name: snapshot(stored) for name, stored in contents.large.items()}
        small = {
            name: {key: tensor.to("cpu", copy=True) for key, tensor in stored.items()}
            for name, stored in contents.small.items()
        }
        contents = replace(contents, small=small, large={})
        self._thread = threading.Thread(
            target=self._keep_error,
            args=(directory, contents, files, lineage, then),
            name="saver",
            daemon=True,  # a process that ends because of an error must not wait for other ones
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. Raises StorageError if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _keep_error(self, directory: Path, *args: Any) -> None:
        try:
            self._write(directory, *args)
        except BaseException as error:  # no other error of a thread would be reported either
            refused = tensors.refusal(error)
            known = StorageError(f"{directory}: cannot be saved ({refused})") if refused else error
            self._error = known

    def _write(
        self,
        directory: Path,
        contents: Contents,
        files: _Files,
        lineage: dict[str, Any],
        then: Callable[[], object],
    ) -> None:
        with ExitStack() as stack:
            # Only the main process makes the folder and, at the end, gives it its name.
            partial = self._world.on_main(
                lambda: stack.enter_context(complete_or_absent(directory, lineage))
            )
            for name, parts in files.items():
                write_parts(partial / name, parts, self._world)
            self._world.on_main(lambda: contents.write_small(partial))
            self._world.on_main(stack.close)
        self._world.on_main(then)
