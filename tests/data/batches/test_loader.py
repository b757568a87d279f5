import json
from itertools import islice

import numpy as np
import pytest
import torch
from data_samples import TEXTS

from openpalm.data.batches.loader import (
    IGNORE,
    Batch,
    evaluation_batches,
    example_loader,
    token_loader,
    truncated,
)
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.conversation import Example, Message, render
from openpalm.errors import DataError

TOKENS = np.arange(1000, dtype=np.uint16)
EXAMPLES = [
    Example(list(range(i, i + 2 + 7 * i % 40)), [j % 3 > 0 for j in range(2 + 7 * i % 40)])
    for i in range(1, 24)
]


def windows_of(tokens=TOKENS, **options):
    return token_loader(tokens, **{"sequence_length": 16, "rows": 4, "seed": 1, **options})


def examples_of(examples=EXAMPLES, **options):
    return example_loader(examples, **{"sequence_length": 32, "rows": 4, "seed": 1, **options})


MAKERS = pytest.mark.parametrize("make", [windows_of, examples_of])


def rows(batches, time=40):
    """All rows of some batches at one width, as (inputs, targets)."""
    flat = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            missing = time - len(inputs)
            padded = torch.nn.functional.pad(inputs, (0, missing))
            flat.append((padded, torch.nn.functional.pad(targets, (0, missing), value=IGNORE)))
    return [torch.stack(pair).tolist() for pair in flat]


@MAKERS
def test_any_number_of_ranks_sees_the_same_global_order(make):
    alone = rows(islice(make(rows=8), 20))
    for world_size, each in ((2, 4), (4, 2), (8, 1)):
        ranks = [make(rows=each, rank=r, world_size=world_size) for r in range(world_size)]
        together = [batch for _ in range(20) for batch in (next(rank) for rank in ranks)]
        assert rows(together) == alone
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@MAKERS
def test_resumed_equals_uninterrupted_at_every_cursor(make):
    whole = make(rows=3)
    batches, cursors = [], []
    for _ in range(50):
        cursors.append(json.dumps(whole.state_dict()))
        batches.append(next(whole))
    for i, cursor in enumerate(cursors):
        resumed = make(rows=3)
        resumed.load_state_dict(json.loads(cursor))
        assert rows(islice(resumed, 2)) == rows(batches[i : i + 2]) or i == 49
        assert json.dumps(make(rows=3).state_dict()) == cursors[0]


@MAKERS
def test_a_cursor_serves_any_number_of_ranks(make):
    before = make(rows=4)
    rows(islice(before, 5))
    cursor = before.state_dict()
    assert cursor["rows_consumed"] == 20
    expected = rows(islice(before, 4))
    ranks = [make(rows=2, rank=r, world_size=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(cursor)
    assert rows(batch for _ in range(4) for batch in (next(rank) for rank in ranks)) == expected


@pytest.mark.parametrize(
    "other",
    [
        windows_of(seed=2),
        windows_of(sequence_length=8),
        windows_of(TOKENS[:-1]),
        windows_of(TOKENS[::-1].copy()),
        examples_of(),
        examples_of(EXAMPLES[:-1]),
        examples_of([*EXAMPLES[:-1], Example([9, 9], [True, True])]),
    ],
)
def test_a_cursor_of_other_data_is_refused(other):
    for loader in (windows_of(), examples_of()):
        if loader.state_dict() != other.state_dict():
            with pytest.raises(DataError, match="the data cursor is of other data"):
                loader.load_state_dict(other.state_dict())


@pytest.mark.parametrize("consumed", [-1, None, "3", 2.0, True])
def test_a_damaged_cursor_is_refused(consumed):
    loader = windows_of()
    with pytest.raises(DataError, match="rows_consumed"):
        loader.load_state_dict({**loader.state_dict(), "rows_consumed": consumed})


def test_a_window_is_text_in_order_and_its_targets_are_one_ahead():
    for batch in islice(windows_of(), 30):
        assert batch.inputs.shape == batch.targets.shape == (4, 16)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert (batch.targets == batch.inputs + 1).all()  # TOKENS count up
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()


@pytest.mark.parametrize("size", [17, 18, 31, 32, 33, 47, 48, 49, 333, 1000])
def test_no_token_is_a_target_twice_in_an_epoch(size):
    loader = windows_of(TOKENS[:size], rows=1)
    phases = set()
    for _ in range(12):
        targets = torch.cat([batch.targets for batch in islice(loader, loader.rows_per_epoch)])
        assert targets.unique().numel() == targets.numel()
        assert targets.max() < size
        # At most two windows' worth stays out of an epoch.
        assert targets.numel() > size - 2 * 16 - 1
        phases.add(int(targets.min()) % 16)
    assert len(phases) > 4 if size >= 48 else phases


def test_every_token_is_a_target_in_some_epoch():
    loader = windows_of(rows=8)
    seen = torch.cat([batch.targets for batch in islice(loader, 800)]).unique()
    assert seen.numel() > 990


def test_epochs_and_seeds_are_shuffled_differently():
    def starts(loader):
        return [int(next(loader).inputs[0, 0]) // 16 for _ in range(loader.rows_per_epoch)]

    loader = windows_of(rows=1)
    one, two = starts(loader), starts(loader)
    other = starts(windows_of(rows=1, seed=2))
    for order in (one, two, other):
        assert order != sorted(order)
    assert one != two
    assert one != other


def test_the_order_is_fixed_for_all_time():
    # A checkpoint's cursor means nothing without the order: change it and old runs resume wrongly.
    assert next(windows_of()).inputs[:, 0].tolist() == [787, 51, 723, 195]


def test_too_few_tokens():
    assert windows_of(TOKENS[:17]).rows_per_epoch == 1
    with pytest.raises(DataError, match="needs 17 tokens, the data has 16; use a shorter sequence"):
        windows_of(TOKENS[:16])


@pytest.mark.parametrize("options", [{"rows": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_rows_and_ranks_out_of_range_are_our_own_bug(options):
    with pytest.raises(ValueError, match="out of range"):
        windows_of(**options)


@pytest.mark.parametrize("size", [2, 16, 17, 18, 64, 65, 66, 129, 1000])
@pytest.mark.parametrize("count", [1, 3])
def test_every_validation_token_is_predicted_exactly_once(size, count):
    predicted = []
    for batch in evaluation_batches(TOKENS[:size], sequence_length=16, rows=count):
        counts = batch.targets != IGNORE
        assert (batch.targets[counts] == batch.inputs[counts] + 1).all()
        assert batch.inputs.shape[0] <= count
        assert batch.inputs.shape[1] == 16
        predicted += batch.targets[counts].tolist()
    assert predicted == list(range(1, size))


def test_nothing_to_predict():
    with pytest.raises(DataError, match="nothing to predict in 1 token;"):
        next(evaluation_batches(TOKENS[:1], sequence_length=16, rows=1))


def test_examples_are_padded_and_masked_and_each_comes_once_an_epoch():
    loader = examples_of(rows=1)
    seen = []
    for batch in islice(loader, len(EXAMPLES)):
        (inputs,), (targets,) = batch.inputs.tolist(), batch.targets.tolist()
        (example,) = (e for e in EXAMPLES if e.ids[0] == inputs[0])
        seen.append(example.ids[0])
        ids, mask = example.ids[:33], example.loss_mask[:33]
        assert len(inputs) % 16 == 0
        assert len(inputs) - 16 < len(ids) - 1 <= len(inputs)
        assert inputs[: len(ids) - 1] == ids[:-1]
        wanted = [i if counts else IGNORE for i, counts in zip(ids[1:], mask[1:], strict=True)]
        assert targets == wanted + [IGNORE] * (len(inputs) - len(wanted))
    assert sorted(seen) == [example.ids[0] for example in EXAMPLES]
    assert seen != sorted(seen)
    assert truncated(EXAMPLES, 32) == sum(len(example.ids) > 33 for example in EXAMPLES) > 0


def test_the_width_stops_at_an_odd_sequence_length():
    batch = next(examples_of([Example(list(range(50)), [True] * 50)], sequence_length=21, rows=1))
    assert batch.targets.tolist() == [list(range(1, 22))]


def test_a_conversation_is_learnt_as_it_is_rendered(byte):
    talk = [Message("user", TEXTS[0]), Message("assistant", "Yes.")]
    rendered = render(byte, talk)
    (targets,) = next(examples_of([rendered], rows=1, sequence_length=256)).targets
    assert targets[targets != IGNORE].tolist() == [*b"Yes.", byte.special_id("<|end|>")]


def test_examples_without_a_target():
    with pytest.raises(DataError, match="of 2 examples 1 with fewer than 2 tokens"):
        examples_of([Example([1], [True]), Example([1, 2], [True, True])])
    with pytest.raises(DataError, match="of 0 examples 0 with"):
        examples_of([])


def test_a_dataset_loads_the_same_from_one_shard_or_many(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 9))
    for out, size in (("one", 10**6), ("many", 37)):
        prepare(
            PrepareRequest(
                inputs=[str(tmp_path / "a.txt")],
                out=tmp_path / out,
                tokenizer="byte",
                shard_tokens=size,
            )
        )
    one, many = (open_dataset(tmp_path / out).tokens("train") for out in ("one", "many"))
    assert rows(islice(windows_of(one), 50)) == rows(islice(windows_of(many), 50))
    a, b = (rows(evaluation_batches(tokens, sequence_length=16, rows=2)) for tokens in (one, many))
    assert a == b


def test_a_batch_moves_as_one():
    batch = Batch(torch.zeros(1, 2), torch.ones(1, 2)).to("meta")
    assert {batch.inputs.device.type, batch.targets.device.type} == {"meta"}
