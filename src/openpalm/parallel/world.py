"""This process's rank among how many. A no-op alone.

The seam for many processes: everything that sums over ranks comes through here.
"""

import os
from dataclasses import dataclass

from openpalm.errors import SettingsError


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks."""
        return value


def world() -> World:
    """The processes of this run. Raises SettingsError under a launcher of several, for now."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise SettingsError(f"WORLD_SIZE ({size}): training on several processes is still to come")
    return World()
