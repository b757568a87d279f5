"""Rank and world size of this process, and sums over all ranks.

Distributed training will enter here: everything that sums over ranks calls World.sum.
"""

import os
from dataclasses import dataclass

from openpalm.errors import SettingsError


@dataclass(frozen=True)
class World:
    """Rank and number of processes; one process by default."""

    rank: int = 0
    size: int = 1

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks."""
        return value


def world() -> World:
    """The world of this run. Raises SettingsError under a launcher with several processes."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise SettingsError(f"WORLD_SIZE ({size}): training on several processes is still to come")
    return World()
