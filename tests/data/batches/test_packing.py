"""Packing: every example whole and once an epoch, in shared rows; resumed where it stopped."""

import random
from itertools import islice

import pytest
import torch
from data_samples import TEXTS

from openpalm.data.batches.loader import IGNORE, example_loader, packed, packed_loader, padded
from openpalm.data.batches.order import mixture
from openpalm.data.batches.packing import best_fit
from openpalm.data.text.conversation import Example
from openpalm.errors import DataError


def made(lengths, seed=0):
    drawn = random.Random(seed)
    return [
        Example(
            [drawn.randrange(1, 99) for _ in range(length + 1)],
            [drawn.random() < 0.7 for _ in range(length + 1)],
        )
        for length in lengths
    ]


LENGTHS = [1, 30, 7, 16, 5, 40, 2, 9, 11, 32, 3, 3, 28, 6]
CAPACITY = 32


def loader(rows=2, examples=None, **changes):
    given = {"rows": rows, "seed": 5, "sequence_length": CAPACITY}
    return packed_loader(made(LENGTHS) if examples is None else examples, **given | changes)


def test_best_fit_by_hand():
    assert best_fit([6, 5, 4, 3, 1, 1, 10], 10) == [[0, 2], [1, 3, 4, 5], [6]]
    assert best_fit([], 10) == []
    # The fullest row that has room, not the first: 3 goes beside 7, so that 4 fits beside 6.
    assert best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_what_trying_every_row_gives(seed):
    drawn = random.Random(seed)
    lengths = [drawn.randint(1, 50) for _ in range(400)]
    rooms, expected = [], []
    for item, length in enumerate(lengths):
        fitting = [room for room in rooms if room >= length]
        at = rooms.index(min(fitting)) if fitting else len(rooms)
        if not fitting:
            rooms.append(50)
            expected.append([])
        rooms[at] -= length
        expected[at].append(item)
    found = best_fit(lengths, 50)
    fill = [sorted(sum(lengths[i] for i in row) for row in rows) for rows in (found, expected)]
    assert fill[0] == fill[1]  # which of two rows with equal room is taken is left open
    assert sorted(item for row in found for item in row) == list(range(400))
    assert sum(lengths) / 50 / len(found) > 0.93


def segments_of(batch):
    """(ids but the last, targets) of every example in a batch; padding is checked and left out."""
    found = []
    for inputs, targets, segments in zip(batch.inputs, batch.targets, batch.segments, strict=True):
        for segment in segments.unique_consecutive().tolist():
            inside = segments == segment
            part = (tuple(inputs[inside].tolist()), tuple(targets[inside].tolist()))
            if segment == -1:
                assert set(part[0]) == {0}
                assert set(part[1]) == {IGNORE}
            else:
                found.append(part)
    return found


def alone(example):
    """What a row of its own would hold, of its real length."""
    size = min(len(example.ids) - 1, CAPACITY)
    inputs, targets = padded([example], CAPACITY)
    return tuple(inputs[0, :size].tolist()), tuple(targets[0, :size].tolist())


def check_an_epoch_has_every_example_whole_and_once(make):
    examples = made(LENGTHS)
    batches_of = make(examples)
    for _ in range(3):
        size, first = next(batches_of)
        batches = [first, *(batch for _, batch in islice(batches_of, size - 1))]
        found = [part for batch in batches for part in segments_of(batch)]
        assert sorted(found) == sorted(map(alone, examples))
        assert all(batch.inputs.shape[1] <= CAPACITY for batch in batches)


def whole(examples):
    """(batches an epoch, batch) of a loader of one row."""
    packer = loader(1, examples)
    return ((packer.rows_per_epoch, batch) for batch in packer)


def test_an_epoch_has_every_example_whole_and_once():
    check_an_epoch_has_every_example_whole_and_once(whole)

    def loses(examples):
        for batch in (packer := loader(1, examples)):
            batch.targets[0, 0] = IGNORE
            yield packer.rows_per_epoch, batch

    def repeats(examples):
        packer = loader(1, examples)
        batches = list(islice(packer, 3 * packer.rows_per_epoch))
        yield from ((packer.rows_per_epoch, batches[i - i % 2]) for i in range(len(batches)))

    for bug in (loses, repeats):
        with pytest.raises(AssertionError):
            check_an_epoch_has_every_example_whole_and_once(bug)


def test_less_padding_than_one_example_a_row():
    examples = made([3, 5, 8, 13, 21] * 40)
    together, apart = (
        make(examples, rows=4, seed=0, sequence_length=CAPACITY)
        for make in (packed_loader, example_loader)
    )
    assert apart.rows_per_epoch == 200
    assert together.rows_per_epoch < 70
    counts = [
        sum(int((next(rows).targets != IGNORE).sum()) for _ in range(rows.rows_per_epoch // 4))
        for rows in (together, apart)
    ]
    assert counts[0] == pytest.approx(counts[1], rel=0.06)


def test_epochs_differ_and_the_seed_fixes_them():
    first, again, other = loader(1), loader(1), loader(1, seed=6)
    epochs = [[segments_of(next(first)) for _ in range(first.rows_per_epoch)] for _ in range(2)]
    assert [segments_of(next(again)) for _ in range(again.rows_per_epoch)] == epochs[0]
    assert epochs[0] != epochs[1]
    assert [segments_of(next(other)) for _ in range(other.rows_per_epoch)] != epochs[0]


@pytest.mark.parametrize("taken", [1, 4, 9, 30])
def test_resumed_is_uninterrupted(taken):
    whole = loader()
    for _ in range(taken):
        next(whole)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(9):
        a, b = next(whole), next(resumed)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.segments, b.segments)


def test_two_ranks_see_what_one_sees():
    one = loader(4)
    two = [loader(2, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(6):
        together = [part for rank in two for part in segments_of(next(rank))]
        assert together == segments_of(next(one))


def test_a_cursor_of_other_data_is_refused():
    state = loader().state_dict()
    others = [
        loader(examples=made(LENGTHS, seed=1)),
        loader(sequence_length=33),
        loader(draws=mixture([4, 10], [7, 7], 5)),
        example_loader(made(LENGTHS), rows=2, seed=5, sequence_length=CAPACITY),
    ]
    for other in others:
        with pytest.raises(DataError, match="the data cursor is of other data"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="fewer than 2 tokens"):
        loader(examples=made([3, 0]))


def test_a_mixture_is_packed_by_its_shares():
    examples = made([10] * 12)
    draws = mixture([2, 10], [6, 2], seed=0)
    packer = loader(1, examples, draws=draws)
    found = [p for _ in range(packer.rows_per_epoch) for p in segments_of(next(packer))]
    rare = [part for part in found if part in [alone(r) for r in examples[:2]]]
    assert (len(found), len(rare)) == (8, 6)


def test_the_layout_of_a_row(byte):
    examples = [Example(byte.encode(text), [True] * len(byte.encode(text))) for text in TEXTS[:2]]
    sizes = [len(example.ids) - 1 for example in examples]
    batch = packed([examples], sum(sizes) + 3)
    assert batch.segments[0, : sum(sizes)].tolist() == [0] * sizes[0] + [1] * sizes[1]
    assert batch.segments[0, sum(sizes) :].tolist() == [-1] * (batch.inputs.shape[1] - sum(sizes))
    moved = batch.to("meta")
    assert moved.segments.device.type == "meta"
