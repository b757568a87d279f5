"""Epochs in new orders and dropped sequences, compared with lists; kills and jobs with one run."""

import itertools
import json
import os
from importlib.util import find_spec

import numpy as np
import pytest

from openpalm.data.corpus import document_reader
from openpalm.data.dataset.inspection import inspect_dataset
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare import progress_file, repack
from openpalm.data.prepare.parts import build
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError

END = 256  # of the byte tokenizer


class Killed(BaseException):
    """What no handler of ours expects."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(document_reader, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(progress_file, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(repack, "CHUNK_TOKENS", 700)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def inputs(tmp_path):
    rows = [f"document {i}: " + chr(97 + i % 26) * (7 * i % 90) for i in range(250)]
    rows[20] = "z" * 1500
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return [str(path)]


def run(inputs, out, **options):
    options = {"tokenizer": "byte", "val": "hash", "shard_tokens": 3001, **options}
    return prepare(PrepareRequest(inputs=inputs, out=out, **options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens(folder, split="train"):
    return open_dataset(folder).tokens(split)[:].tolist()


def documents(ids):
    """The ids cut behind each end."""
    found, ids = [], list(ids)
    while ids:
        end = ids.index(END) + 1
        found.append(tuple(ids[:end]))
        ids = ids[end:]
    return found


def test_later_epochs_hold_the_same_documents_in_other_orders(inputs, tmp_path):
    once = run(inputs, tmp_path / "once")
    three = run(inputs, tmp_path / "three", repack_epochs=3)
    plain, repeated = tokens(tmp_path / "once"), tokens(tmp_path / "three")
    epochs = [repeated[i * len(plain) : (i + 1) * len(plain)] for i in range(3)]
    assert len(repeated) == 3 * len(plain)
    assert epochs[0] == plain
    orders = [documents(epoch) for epoch in epochs]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert tokens(tmp_path / "three", "val") == tokens(tmp_path / "once", "val")
    assert three.splits["train"].documents == 3 * once.splits["train"].documents
    assert three.splits["train"].bytes == 3 * once.splits["train"].bytes
    starts = open_dataset(tmp_path / "three").document_offsets("train").tolist()
    lengths = [len(document) for order in orders for document in order]
    assert starts == list(itertools.accumulate([0, *lengths[:-1]]))
    run(inputs, tmp_path / "other", repack_epochs=3, seed=1)
    assert tokens(tmp_path / "other")[: len(plain)] == plain
    assert tokens(tmp_path / "other") != repeated
    inspect_dataset(open_dataset(tmp_path / "three"), samples=1)


def original_epochs(stream, length, epochs):
    """mesh-transformer-jax with --preserve-data-order: the rest of an epoch begins the next one."""
    found, rest, whole = [], [], list(stream)
    for _ in range(epochs):
        whole = rest + whole
        count = len(whole) // length * length
        found += whole[:count]
        whole, rest = whole[:count], whole[count:]
    return found


def test_a_kept_order_is_that_of_the_original(inputs, tmp_path):
    run(inputs, tmp_path / "once")
    run(inputs, tmp_path / "four", repack_epochs=4, keep_order=True)
    expected = original_epochs(tokens(tmp_path / "once"), 129, 4)
    assert len(expected) % 129 == 0
    assert tokens(tmp_path / "four")[: len(expected)] == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_sequences_with_few_distinct_tokens_are_dropped(split, inputs, tmp_path):
    run(inputs, tmp_path / "all")
    options = {"min_unique_tokens": 18, "sequence_tokens": 100}
    manifest = run(inputs, tmp_path / "some", **options)
    plain = tokens(tmp_path / "all", split)
    rows = [plain[i : i + 100] for i in range(0, len(plain), 100)]
    kept = [row for row in rows if len(row) < 100 or len(set(row)) >= 18]
    assert 0 < len(kept) < len(rows)
    assert tokens(tmp_path / "some", split) == [i for row in kept for i in row]
    entry = manifest.splits[split]
    assert entry.dropped == len(rows) - len(kept)
    assert entry.bytes == sum(i != END for row in kept for i in row)
    # A document starts where one did, and behind what was dropped.
    whole = set(open_dataset(tmp_path / "all").document_offsets(split).tolist())
    expected, position, cut = [], 0, False
    for number, row in enumerate(rows):
        if row in kept:
            inside = [i for i in range(len(row)) if number * 100 + i in whole or (cut and i == 0)]
            expected += [position + i for i in inside]
            position += len(row)
        cut = row not in kept
    found = open_dataset(tmp_path / "some").document_offsets(split)
    assert found.tolist() == expected
    assert entry.documents == len(expected)
    assert manifest.settings.sequence_tokens == 100
    assert len(plain) == len(tokens(tmp_path / "some", split)) + 100 * entry.dropped


def test_when_all_is_dropped_the_error_says_why(inputs, tmp_path):
    path = tmp_path / "same.txt"
    path.write_text("a" * 4000)
    with pytest.raises(DataError, match=r"--min-unique-tokens 5: drops all sequences of the train"):
        run([str(path)], tmp_path / "out", min_unique_tokens=5, sequence_tokens=10)
    assert not (tmp_path / "out").exists()


CASES = [
    {"repack_epochs": 3, "seed": 5, "min_unique_tokens": 18, "sequence_tokens": 100},
    {"repack_epochs": 2, "keep_order": True, "tokenizer": "bpe:300"},
    {"split_text": "1", "detokenize": "wikitext", "min_unique_tokens": 5, "sequence_tokens": 30},
    pytest.param(
        {"fix_text": "ftfy", "repack_epochs": 2, "val": "tail:0.3"},
        marks=pytest.mark.skipif(find_spec("ftfy") is None, reason="needs ftfy"),
    ),
]


def until_killed(inputs, out, after, monkeypatch, **options):
    calls = itertools.count(1)

    def failing(handle):
        if next(calls) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        try:
            run(inputs, out, **options)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("options", CASES)
def test_killed_at_many_moments_the_bytes_are_the_same(options, inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "at-once", **options)
    whole = contents(tmp_path / "at-once")
    assert not any(name.startswith("base-") for name in whole)
    kills = repacking = 0
    for after in range(5, 3000, 29):
        out = tmp_path / f"killed-{after}"
        if not until_killed(inputs, out, after, monkeypatch, **options):
            break
        kills += 1
        repacking += b'"repacked"' in (out / progress_file.PARTIAL).read_bytes()
        run(inputs, out, **options)
        assert contents(out) == whole
    assert kills > 3
    assert repacking > 0


def test_what_is_repacked_is_not_read_again(inputs, tmp_path, monkeypatch):
    options = {"repack_epochs": 12, "keep_order": True}
    assert until_killed(inputs, tmp_path / "out", 700, monkeypatch, **options)
    lines = (tmp_path / "out" / progress_file.PARTIAL).read_text().splitlines()
    read = max(json.loads(line)["repacked"]["read"] for line in lines if '"repacked"' in line)
    begun = []
    chunks = repack._Base.chunks

    def noting(self, begin):
        begun.append(begin)
        return chunks(self, begin)

    monkeypatch.setattr(repack._Base, "chunks", noting)
    manifest = run(inputs, tmp_path / "out", **options)
    tokens_an_epoch = manifest.splits["train"].tokens // 12
    assert read > 2 * tokens_an_epoch
    assert begun[0] == read % tokens_an_epoch
    assert len(begun) <= 13 - read // tokens_an_epoch


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("jobs", [1, 3])
def test_parts_joined_are_what_one_job_writes(jobs, options, inputs, tmp_path):
    whole = run(inputs, tmp_path / "whole", **options)
    parts = [tmp_path / f"part-{i}" for i in range(1, jobs + 1)]
    for i, part in enumerate(parts, start=1):
        run(inputs, part, shard=f"{i}/{jobs}", **options)
    assert build(parts[::-1], tmp_path / "joined") == whole
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def test_settings_without_effect_are_not_in_the_manifest(inputs, tmp_path):
    run(inputs, tmp_path / "plain")
    run(inputs, tmp_path / "same", seed=7, keep_order=True, sequence_tokens=99)
    assert contents(tmp_path / "same") == contents(tmp_path / "plain")
    content = json.loads((tmp_path / "plain" / "manifest.json").read_bytes())
    first = ["tokenizer", "text_field", "val_fraction", "val", "dedup", "shard_tokens"]
    assert [*content["settings"]] == first
    assert [*content["splits"]["train"]] == ["documents", "tokens", "bytes", "files"]
    assert run(inputs, tmp_path / "plain", seed=3).unchanged
    with pytest.raises(DataError, match=r"another dataset \(other repack_epochs\)"):
        run(inputs, tmp_path / "plain", repack_epochs=2)
    settings = run(inputs, tmp_path / "p", repack_epochs=2, split_text="x").settings
    read = open_dataset(tmp_path / "p").manifest.settings
    assert settings == read
    assert (read.repack_epochs, read.split_text, read.fix_text) == (2, "x", "none")


def test_unfinished_work_with_other_options_is_refused(inputs, tmp_path, monkeypatch):
    assert until_killed(inputs, tmp_path / "out", 30, monkeypatch, repack_epochs=2)
    with pytest.raises(DataError, match=r"an unfinished dataset \(other repack_epochs\)"):
        run(inputs, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"repack_epochs": 0}, "--repack-epochs 0: must be 1 to 1000"),
        ({"sequence_tokens": 1}, "--sequence-tokens 1: must be 2 to"),
        ({"min_unique_tokens": 3000}, "--min-unique-tokens 3000: must be 0 to --sequence-tokens"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
    ],
)
def test_values_out_of_range(options, says, inputs, tmp_path):
    with pytest.raises(DataError, match=says):
        run(inputs, tmp_path / "out", **options)


def test_a_long_document_is_shuffled_in_chunks(tmp_path):
    rows = ["a" * 5000, "b" * 40, "c" * 2500, *(f"text {i}" for i in range(300))]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    run([str(path)], tmp_path / "out", repack_epochs=2, shard_tokens=500)
    found = np.array(tokens(tmp_path / "out"))
    first, second = np.split(found, 2)
    assert sorted(documents(first)) == sorted(documents(second))
