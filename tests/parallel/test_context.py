"""How positions are dealt to the processes of context parallelism."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.errors import SettingsError
from openpalm.parallel.config import Axes
from openpalm.parallel.context import ContextSplit, check_length, context_split
from openpalm.parallel.world import World
from openpalm.train.objective import NextToken


def splits(size: int) -> list[ContextSplit]:
    group: Any = None
    return [ContextSplit(rank, size, group) for rank in range(size)]


def batch(width: int, segments: bool = False) -> Batch:
    ids = torch.arange(2 * width).view(2, width)
    return Batch(ids, ids + 1, ids // 5 if segments else None)


def test_chunks_in_zigzag_order():
    parts = [split.part(batch(12)).inputs[0].tolist() for split in splits(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_position_once_and_equal_work(size: int):
    whole = batch(48)
    places = [split.layout(whole).positions for split in splits(size)]
    assert sorted(torch.cat(places).tolist()) == list(range(48))
    # A query costs as many products as there are keys up to it.
    assert len({int(place.sum()) for place in places}) == 1


def test_narrow_rows_are_padded_without_targets():
    narrow = batch(13, segments=True)
    parts = [split.part(narrow) for split in splits(2)]
    for part in parts:
        assert part.inputs.shape == part.targets.shape == (2, 8)
    targets = torch.cat([part.targets for part in parts], dim=1)
    assert sorted(targets[targets != IGNORE].tolist()) == narrow.targets.flatten().tolist()
    segments = parts[0].segments
    assert segments is not None
    assert (segments[:, -3:] == -1).all()


def test_positions_restart_in_each_document():
    whole = replace(batch(16), segments=torch.tensor([[0] * 3 + [1] * 13, [0] * 10 + [1] * 6]))
    first, second = (split.layout(whole).positions.tolist() for split in splits(2))
    assert first == [[0, 1, 2, 0, 9, 10, 11, 12], [0, 1, 2, 3, 2, 3, 4, 5]]
    assert second == [[1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9, 0, 1]]


def test_each_process_counts_its_own_targets():
    given = batch(16)
    given.targets[:, 3:] = IGNORE
    counts = [NextToken(context=split).count(given) for split in splits(2)]
    assert (counts, NextToken().count(given)) == ([6, 0], 6)


@pytest.mark.parametrize(("length", "near"), [(8190, "8184 or 8192"), (5, "8")])
def test_a_length_that_the_chunks_do_not_divide_is_refused(length: int, near: str):
    world = World(size=4, axes=Axes(context=4))
    wanted = f"--sequence-length {length}: must be a multiple of 8 with --parallel.context 4; use "
    with pytest.raises(SettingsError, match=f"^{wanted}{near}$"):
        check_length(world, length)
    check_length(world, 2 * int(near.split()[-1]))


def test_no_split_for_one_process():
    check_length(World(), 5)
    assert context_split(World()) is None
