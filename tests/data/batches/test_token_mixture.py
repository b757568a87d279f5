"""Several datasets in one order: in proportion, each once before twice, resumed at any row."""

import json
from bisect import bisect_right
from itertools import accumulate, islice, pairwise

import pytest
import torch

from openpalm.data.batches.loader import token_loader
from openpalm.data.batches.token_mixture import open_sets
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError

LENGTH = 16
SIZES = {"docs": 900, "code": 300, "mail": 60}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three datasets; each says which it is by its letters."""
    folder = tmp_path_factory.mktemp("sets")
    for letter, (name, words) in zip("dcm", SIZES.items(), strict=True):
        text = " ".join(letter * (2 + i % 5) for i in range(words))
        (folder / f"{name}.txt").write_text(text)
        prepare(
            PrepareRequest(
                inputs=[str(folder / f"{name}.txt")], out=folder / name, tokenizer="byte"
            )
        )
    return folder


def write(folder, text, name="mix.yaml"):
    path = folder / name
    path.write_text(text)
    return path


WEIGHTED = """
tasks:
  - {data: docs, weight: 0.5}
  - {data: code, weight: 0.3}
  - {data: mail, weight: 0.2}
"""


@pytest.fixture
def sets(folder):
    return open_sets(write(folder, WEIGHTED))


def loader(sets, rows=1, seed=3, **more):
    return token_loader(
        sets.tokens("train"),
        sequence_length=LENGTH,
        rows=rows,
        seed=seed,
        draws=sets.draws(LENGTH, seed),
        **more,
    )


def ends_of(sets):
    return list(accumulate(len(dataset.tokens("train")) for dataset in sets.datasets))


def test_one_directory_is_read_as_ever(folder):
    sets = open_sets(folder / "docs")
    dataset = open_dataset(folder / "docs")
    assert sets.names == ("docs",)
    assert sets.digest == dataset.manifest.digest
    plain = token_loader(dataset.tokens("train"), sequence_length=LENGTH, rows=4, seed=3)
    ours = loader(sets, rows=4)
    assert ours.state_dict() == plain.state_dict()
    for _ in range(30):
        assert torch.equal(next(ours).inputs, next(plain).inputs)


def check_proportions(draws, ends, shares):
    """Of any number of first draws, each set has its share but for one draw a set."""
    counts = [0] * len(shares)
    for draw in range(3 * sum(shares)):
        counts[bisect_right(ends, draws.item(draw))] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - (draw + 1) * share / sum(shares)) < len(shares)
    assert counts == [3 * share for share in shares]


def test_shares_are_of_tokens_all_along(sets):
    shares = sets.shares(LENGTH)
    sizes = [len(d.tokens("train")) // LENGTH for d in sets.datasets]
    assert sum(shares) == sum(sizes)
    for share, weight in zip(shares, (0.5, 0.3, 0.2), strict=True):
        assert abs(share - weight * sum(sizes)) <= 1
    draws, ends = sets.draws(LENGTH, 3), ends_of(sets)
    check_proportions(draws, ends, shares)

    def one_after_the_other(draw):
        index = draw % sum(shares)
        return ends[bisect_right(list(accumulate(shares)), index)] - 1

    for bug in (one_after_the_other, lambda draw: draws.item(draw) % ends[1]):
        with pytest.raises(AssertionError):
            check_proportions(draws._replace(item=bug), ends, shares)


def test_a_window_is_of_one_set(sets):
    batches = loader(sets)
    for batch in islice(batches, 2 * batches.rows_per_epoch):
        letters = {chr(i) for i in [*batch.inputs[0], batch.targets[0, -1]]} & set("dcm")
        assert len(letters) == 1


def check_each_once_before_twice(draws, sets):
    """In every pass of a set its windows do not overlap, and leave little out."""
    ends = ends_of(sets)
    starts = [draws.item(draw) for draw in range(8 * draws.epoch)]
    for first, end in pairwise([0, *ends]):
        own = [start for start in starts if first <= start < end]
        size = (end - first - LENGTH) // LENGTH
        for at in range(0, len(own) - size + 1, size):
            one_pass = sorted(own[at : at + size])
            assert {b - a for a, b in pairwise(one_pass)} == {LENGTH}
            assert one_pass[0] - first < LENGTH
            assert one_pass[-1] + LENGTH < end


def test_a_set_is_gone_through_before_it_repeats(sets):
    draws = sets.draws(LENGTH, 3)
    check_each_once_before_twice(draws, sets)
    again = draws._replace(item=lambda draw: draws.item(draw % draws.epoch))
    with pytest.raises(AssertionError):
        check_each_once_before_twice(again, sets)


def test_without_weights_a_set_counts_as_its_tokens(folder):
    sets = open_sets(write(folder, "tasks: [{data: docs}, {data: code}]"))
    assert sets.shares(LENGTH) == [len(d.tokens("train")) // LENGTH for d in sets.datasets]


@pytest.mark.parametrize("taken", [0, 1, 7, 40, 333])
def test_resumed_on_any_number_of_ranks(sets, taken):
    whole = loader(sets, rows=4)
    for _ in range(taken):
        next(whole)
    cursor = json.loads(json.dumps(whole.state_dict()))
    ranks = [loader(sets, rows=2, rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(cursor)
    for batch in islice(whole, 5):
        together = torch.cat([next(rank).inputs for rank in ranks])
        assert torch.equal(together, batch.inputs)


def test_a_cursor_of_other_weights_is_refused(sets, folder):
    other = open_sets(write(folder, WEIGHTED.replace("0.3", "0.4"), "other.yaml"))
    with pytest.raises(DataError, match="the data cursor is of other data"):
        loader(other).load_state_dict(loader(sets).state_dict())


def test_the_digest_covers_data_and_weights(sets, folder):
    digests = {
        sets.digest,
        open_sets(folder / "docs").digest,
        open_sets(write(folder, WEIGHTED.replace("0.3", "0.4"), "a.yaml")).digest,
        open_sets(write(folder, "tasks: [{data: docs}, {data: code}]", "b.yaml")).digest,
        open_sets(write(folder, "tasks: [{data: code}, {data: docs}]", "c.yaml")).digest,
    }
    assert len(digests) == 5
    assert open_sets(write(folder, WEIGHTED, "d.yaml")).digest == sets.digest


def test_joined_tokens_are_one_array(sets):
    joined = sets.tokens("train")
    flat = [i for dataset in sets.datasets for i in dataset.tokens("train")[:].tolist()]
    assert len(joined) == len(flat)
    assert joined[:].tolist() == flat
    ends = [len(dataset.tokens("train")) for dataset in sets.datasets]
    for start in (0, 5, ends[0] - 3, ends[0], ends[0] + ends[1] - 1, len(flat) - 2, len(flat)):
        for size in (0, 1, 17, ends[1] + 40):
            assert joined[start : start + size].tolist() == flat[start : start + size]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks: [{data: docs}, {data: bpe}]", r"bpe was prepared with another tokenizer than"),
        ("tasks: [{data: docs}, {data: docs}]", "names .*docs twice; name it once, with a larger"),
        ("cap: 4\ntasks: [{data: docs}]", "a task here has data and weight"),
        (
            "tasks: [{data: docs, templates: [{prompt: a, answer: b}]}]",
            "templates are of fine-tuning",
        ),
        ("tasks: [{data: nothing}]", "nothing: no prepared dataset here"),
        ("tasks: [{data: docs, weight: 1}, {data: code}]", "1 of 2 tasks have a weight"),
    ],
)
def test_mixtures_that_cannot_be_trained_on(folder, text, says):
    if not (folder / "bpe").exists():
        docs = [str(folder / "docs.txt")]
        prepare(PrepareRequest(inputs=docs, out=folder / "bpe", tokenizer="bpe:280"))
    with pytest.raises(DataError, match=says):
        open_sets(write(folder, text, "wrong.yaml"))


def test_sets_of_one_name_are_told_apart(folder, tmp_path):
    for name in ("a", "b"):
        prepare(
            PrepareRequest(
                inputs=[str(folder / "docs.txt")], out=tmp_path / name / "data", tokenizer="byte"
            )
        )
    sets = open_sets(write(tmp_path, "tasks: [{data: a/data}, {data: b/data}]"))
    assert sets.names == (str(tmp_path / "a/data"), str(tmp_path / "b/data"))


def test_a_set_too_short_for_a_sequence_is_named(folder):
    sets = open_sets(write(folder, "tasks: [{data: docs}, {data: mail}]"))
    with pytest.raises(DataError, match="mail: sequence_length 512: needs 513 tokens"):
        sets.draws(512, seed=0)
