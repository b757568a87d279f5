"""Checks before step 1 that all processes were started alike and see the same run directory.

Each process has its own command line, its own installation and its own mounts. If they differ the
run either hangs in a collective, or worse, trains without an error: with FSDP every process updates
its part of the weights with its own learning rate and its own data.
"""

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpalm.base.files import wait_until_seen
from openpalm.errors import SettingsError
from openpalm.parallel.world import World

_SEEN_BY_ALL = ".seen-by-all"


def refuse_differences(here: World, values: Mapping[str, Any]) -> None:
    """Raises SettingsError on all processes if one has other values than process 0.

    values: what must be equal, by the names that a message gives them; groups may be nested.
    """
    everyone = here.gather((_flat(values), socket.gethostname()))
    first, _ = everyone[0]
    for rank, (found, host) in enumerate(everyone):
        for name in sorted(first.keys() | found.keys()):
            if found.get(name) != first.get(name):
                has, main_has = _shown(found.get(name)), _shown(first.get(name))
                raise SettingsError(
                    f"{name}: {has} on process {rank} ({host}), {main_has} on process 0; start all "
                    "processes with the same command, versions and data"
                )


def check_directory(here: World, directory: Path) -> None:
    """Raises SettingsError on all processes if one cannot see or write the main one's directory."""
    if here.size == 1:
        return
    token, file = here.broadcast(uuid.uuid4().hex), directory / _SEEN_BY_ALL
    where = f"process {here.rank} on {socket.gethostname()}"

    def look() -> None:
        if not wait_until_seen(file, lambda: file.read_text(encoding="utf-8") == token):
            raise SettingsError(
                f"--out {directory}: {where} does not see the files that process 0 writes there; "
                "choose a directory on storage that all machines share"
            )
        own = directory / f"{_SEEN_BY_ALL}-{here.rank}"
        try:
            own.write_text("", encoding="utf-8")
            own.unlink()
        except OSError as error:
            raise SettingsError(
                f"--out {directory}: {where} may not write there ({error.strerror}); each process "
                "writes its part of a checkpoint"
            ) from None

    here.on_main(lambda: file.write_text(token, encoding="utf-8"))
    try:
        here.together(look)
    finally:
        if here.is_main:
            file.unlink(missing_ok=True)


def _flat(values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Nested groups as one level, with the names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{group}{name}.") if isinstance(value, dict) else {group + name: value}
        )
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
