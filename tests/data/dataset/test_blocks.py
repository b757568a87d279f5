"""Blocks read back: the tokens, the documents and the mixtures of the prepared dataset."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch

from openpalm.data.batches.loader import evaluation_batches, token_loader
from openpalm.data.batches.token_mixture import open_sets
from openpalm.data.dataset import blocks
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.inspection import inspect_dataset
from openpalm.data.dataset.manifest import MAX_MANIFEST_BYTES
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One text prepared (p), as blocks with the rest (b), without it (d), and shuffled (s)."""
    folder = tmp_path_factory.mktemp("blocks")
    texts = [f"document {i}: " + "one größer word " * (i % 17) for i in range(400)]
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "GROUP_TOKENS", 4 * LENGTH)
        patch.setattr(blocks, "FILE_GROUPS", 16)
        request = PrepareRequest(inputs=[str(path)], out=folder / "p", tokenizer="byte")
        prepare(request)
        for name, seed, rest in (("b", None, "keep"), ("d", None, "drop"), ("s", 5, "drop")):
            given = PrepareRequest(inputs=[str(folder / "p")], out=folder / name, tokenizer="byte")
            write_blocks(BlocksRequest(prepare=given, sequence_length=LENGTH, seed=seed, rest=rest))
    return folder


def sets(folder, name):
    return [open_dataset(folder / one) for one in (name, "p")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_any_slice_is_that_of_the_prepared_tokens(split, folder):
    ours, right = (dataset.tokens(split) for dataset in sets(folder, "b"))
    assert len(ours) == len(right)
    assert ours.dtype == right.dtype
    draw = np.random.default_rng(0)
    for start, stop in [(0, len(right)), (0, 0), *draw.integers(0, len(right), (30, 2)).tolist()]:
        np.testing.assert_array_equal(ours[start:stop], right[start:stop])
    np.testing.assert_array_equal(ours[-5:], right[-5:])


@pytest.mark.parametrize("split", ["train", "val"])
def test_documents_are_those_of_the_index(split, folder):
    ours, right = sets(folder, "b")
    np.testing.assert_array_equal(ours.document_offsets(split), right.document_offsets(split))
    assert ours.manifest.splits[split].documents == right.manifest.splits[split].documents
    found, expected = (Documents([dataset], split) for dataset in (ours, right))
    draw = np.random.default_rng(1)
    for start in draw.integers(0, ours.manifest.splits[split].tokens - 300, 50).tolist():
        np.testing.assert_array_equal(
            found.segments(start, start + 300), expected.segments(start, start + 300)
        )
    # Between two datasets too, whichever comes first.
    both = Documents([right, ours], split), Documents([right, right], split)
    at = right.manifest.splits[split].tokens - 150
    np.testing.assert_array_equal(both[0].segments(at, at + 300), both[1].segments(at, at + 300))


def test_in_shuffled_blocks_a_document_also_starts_at_every_block(folder):
    dataset = open_dataset(folder / "s")
    tokens, marker = dataset.tokens("train")[:], dataset.tokenizer().end_of_text
    expected = {0, *range(0, len(tokens), LENGTH), *(np.flatnonzero(tokens == marker) + 1)}
    assert dataset.document_offsets("train").tolist() == sorted(expected - {len(tokens)})
    segments = Documents([dataset], "train").segments(LENGTH - 3, LENGTH + 3)
    assert segments[3] > segments[2]


def test_training_and_evaluation_get_the_same_batches(folder):
    ours, right = (open_sets(folder / name) for name in ("b", "p"))

    def batches(sets):
        mask = sets.documents("train")
        draws = sets.draws(32, 3)
        loader = token_loader(
            sets.tokens("train"), sequence_length=32, rows=3, seed=3, draws=draws, documents=mask
        )
        yield from islice(loader, 40)
        yield from evaluation_batches(sets.tokens("val"), sequence_length=32, rows=4)

    for found, expected in zip(batches(ours), batches(right), strict=True):
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.targets, expected.targets)
        if expected.segments is not None:
            assert torch.equal(found.segments, expected.segments)


def test_blocks_are_mixed_with_other_sets_by_weight(folder):
    mix = folder / "mix.yaml"
    mix.write_text("tasks:\n  - {data: b, weight: 3}\n  - {data: p, weight: 1}\n")
    mixed = open_sets(mix)
    blocks_share, tokens_share = mixed.shares(32)
    assert blocks_share == pytest.approx(3 * tokens_share, abs=2)
    loader = token_loader(
        mixed.tokens("train"), sequence_length=32, rows=8, seed=0, draws=mixed.draws(32, 0)
    )
    assert next(loader).inputs.shape == (8, 32)


def test_the_summary_and_the_hashes_of_blocks(folder):
    found, right = (inspect_dataset(dataset) for dataset in sets(folder, "b"))
    assert found.splits == right.splits
    assert found.files_checked == len(list((folder / "b").glob("*.parquet")))


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder / "d", tmp_path / "d")
    return tmp_path / "d"


def test_an_altered_file_is_named(copy):
    path = copy / "train-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00001.parquet: was altered, its SHA-256"):
        open_dataset(copy).tokens("train")
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"train-00001.parquet: [\d,]+ bytes, the manifest says"):
        open_dataset(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet: is missing"):
        open_dataset(copy)


def edit(folder, **changes):
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | changes, indent=2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequence_length": 0}, "sequence_length is out of range"),
        ({"sequence_length": 1 << 30}, "sequence_length is out of range"),
        ({"sequence_length": "48"}, "sequence_length '48': must be a whole number"),
        ({"group_blocks": 0}, "sizes of groups or files are out of range"),
        ({"group_blocks": 1 << 40, "file_blocks": 1 << 40}, "groups or files are out of range"),
        ({"file_blocks": 63}, "sizes of groups or files are out of range"),
        ({"file_blocks": 8}, "the files of train contradict its counts"),
        ({"rest": {}}, "sizes of groups or files are out of range"),
        ({"extra": 1}, "unknown setting extra"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changes, says, copy):
    edit(copy, **changes)
    with pytest.raises(DataError, match=says):
        open_dataset(copy)


def lying(copy, rows, kind=None):
    """A first file with other rows; the manifest confirms its size and hash."""
    import hashlib

    path = copy / "val-00000.parquet"
    kind = kind or pyarrow.list_(pyarrow.int32())
    parquet.write_table(pyarrow.table({"input_ids": pyarrow.array(rows, kind)}), path)
    content = json.loads((copy / "manifest.json").read_bytes())
    content["splits"]["val"]["files"][0] |= {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    edit(copy, splits=content["splits"])


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([[7] * LENGTH], None),
        ([[7] * (2 * LENGTH), [], [7] * LENGTH, [7] * LENGTH], None),
        ([[70_000] * LENGTH] * 4, None),
        ([[-1] * LENGTH] * 4, None),
        ([[7] * (LENGTH - 1) + [None]] * 4, None),
        ([[7] * LENGTH] * 4, pyarrow.list_(pyarrow.int64())),
        (["seven"] * 4, pyarrow.string()),
    ],
)
def test_files_that_contradict_their_manifest_are_refused(rows, kind, copy):
    lying(copy, rows, kind)
    with pytest.raises(DataError, match=r"val-00000.parquet: is not the file that the manifest"):
        open_dataset(copy).tokens("val")[: LENGTH * 4]


def test_a_manifest_too_large_to_be_one(copy):
    with (copy / "manifest.json").open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(DataError, match="is no manifest"):
        open_dataset(copy)
