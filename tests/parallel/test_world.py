"""Alone, every sum is the value itself."""

import pytest

from openpalm.errors import SettingsError
from openpalm.parallel.world import World, world


def test_alone_a_sum_is_the_value(monkeypatch: pytest.MonkeyPatch):
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        assert world() == World(rank=0, size=1)
    assert world().sum(0.1) == 0.1


def test_several_processes_are_refused_for_now(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"WORLD_SIZE \(2\)"):
        world()
