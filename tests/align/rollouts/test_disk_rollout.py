"""A rollout in a file: the same numbers, and nothing left of the file."""

import gc
import os
from pathlib import Path

import pytest
import torch

from openpalm.align.rollouts.disk_rollout import spill


def columns():
    generator = torch.Generator().manual_seed(0)
    return {
        "flags": torch.rand(3, 5, generator=generator) > 0.5,  # 15 bytes, so the next is unaligned
        "ids": torch.randint(99, (3, 5), generator=generator),
        "turned": torch.randn(5, 3, generator=generator).T,
    }


def open_files(folder):
    links = [Path(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in os.readlink(p) for p in links if p.is_symlink()), sum(
        str(folder) in line for line in maps
    )


def test_small_ones_stay_where_they_are(tmp_path):
    given = columns()
    size = sum(c.nbytes for c in given.values())
    assert spill(given, size, tmp_path) is given
    assert spill(given, size - 1, tmp_path) is not given


def test_large_ones_are_the_same_from_disk(tmp_path):
    given = columns()
    found = spill(given, 0, tmp_path)
    assert found.keys() == given.keys()
    for name, column in given.items():
        assert found[name].dtype == column.dtype
        assert torch.equal(found[name], column)
    found["ids"][0] = 7
    assert (found["ids"][0] == 7).all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_nothing_is_left_of_the_file(tmp_path):
    found = spill(columns(), 0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_files(tmp_path) == (1, 1), "held by the mapping alone"
    rows = found["ids"][torch.tensor([2, 0])]
    del found
    gc.collect()
    assert open_files(tmp_path) == (0, 0)
    assert torch.equal(rows, columns()["ids"][[2, 0]])
