"""Where documents begin, a window at a time: as counting them, in any cut, without the index."""

import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from openpalm.data.dataset import document_index
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError


def made(folder, name, words, shard_tokens=1 << 28):
    """Documents of so many words each, as a dataset."""
    rows = "".join(f'{{"text": "{name} {i} {"ab " * count}"}}\n' for i, count in enumerate(words))
    (folder / f"{name}.jsonl").write_text(rows)
    request = PrepareRequest(
        inputs=[str(folder / f"{name}.jsonl")],
        out=folder / name,
        tokenizer="byte",
        val="tail:0.3",
        shard_tokens=shard_tokens,
    )
    prepare(request)
    return open_dataset(folder / name)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    drawn = np.random.default_rng(0)
    # Shards of 37 tokens: many documents are longer, so that some have no document of their own.
    return [
        made(folder, "one", drawn.integers(1, 40, 50), shard_tokens=37),
        made(folder, "two", drawn.integers(1, 9, 60)),
        made(folder, "three", [400] + [2] * 9, shard_tokens=50),
    ]


def counted(datasets, split):
    """1 where a document begins, over all tokens of all datasets."""
    begins = []
    for dataset in datasets:
        begins.append(np.zeros(dataset.manifest.splits[split].tokens, dtype=np.int64))
        begins[-1][dataset.document_offsets(split)] = 1
    return np.concatenate(begins)


def check_segments(documents, datasets, split):
    begins = counted(datasets, split)
    for length in (1, 2, 16, 37, 100, 700):
        for start in range(0, len(begins) - length + 1, 1 + length):
            found = documents.segments(start, start + length)
            assert found.dtype == np.int64
            assert (found == begins[start : start + length].cumsum()).all()


@pytest.mark.parametrize("split", ["train", "val"])
def test_segments_are_those_of_counting(datasets, split):
    check_segments(Documents(datasets, split), datasets, split)
    check_segments(Documents(datasets[1:2], split), datasets[1:2], split)


def test_wrong_segments_are_noticed(datasets):
    class OneLate(Documents):
        def segments(self, start, stop):
            return super().segments(start - 1, stop - 1) if start else super().segments(start, stop)

    class ForgetsTheFirstDatasets(Documents):
        def __init__(self, datasets, split):
            super().__init__(datasets, split)
            self._indices = [index._replace(base=0) for index in self._indices]

    for bug in (OneLate, ForgetsTheFirstDatasets):
        with pytest.raises((AssertionError, DataError)):
            check_segments(bug(datasets, "train"), datasets, "train")


def check_reads_little(make, dataset):
    tracemalloc.start()
    documents = make(dataset)
    documents.segments(5000, 5512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # two threads hash in blocks of 256 KiB


def test_no_index_is_read_whole(tmp_path, datasets, monkeypatch):
    """1.6 MB of index: a copy of it would show."""
    index = tmp_path / "long"
    index.mkdir()
    dataset = datasets[1]
    starts = np.arange(0, 400_000, 2, dtype="<u8")
    starts.tofile(index / "train-00000.idx")
    files = [dataset.manifest.splits["train"].files[0]] * 2
    long = _with_files(dataset, index, files[0], tokens=400_000, documents=len(starts))
    check_reads_little(lambda d: Documents([d], "train"), long)

    def copies(starts, start, stop):
        low, high = np.searchsorted(starts, np.array([start, stop]))  # int64
        return starts[low:high].astype(np.int64)

    monkeypatch.setattr(document_index, "_between", copies)
    with pytest.raises(AssertionError):
        check_reads_little(lambda d: Documents([d], "train"), long)


def _with_files(dataset, path, entry, *, tokens, documents):
    """A dataset whose training split is one shard of so many tokens."""
    (path / "train-00000.bin").write_bytes(bytes(2 * tokens))
    names = ("train-00000.bin", "train-00000.idx")
    digests = [hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names]
    files = (
        replace(entry, size=2 * tokens, sha256=digests[0]),
        replace(entry, name=names[1], size=8 * documents, sha256=digests[1]),
    )
    split = replace(
        dataset.manifest.splits["train"], tokens=tokens, documents=documents, files=files
    )
    splits = {"train": split, "val": dataset.manifest.splits["val"]}
    return replace(dataset, path=path, manifest=replace(dataset.manifest, splits=splits))


@pytest.mark.parametrize("starts", [[0, 9, 5, 12], [7, 0, 5, 10]])
def test_a_torn_index_is_refused(tmp_path, datasets, starts):
    np.array(starts, dtype="<u8").tofile(tmp_path / "train-00000.idx")
    entry = datasets[1].manifest.splits["train"].files[0]
    torn = _with_files(datasets[1], tmp_path, entry, tokens=20, documents=4)
    with pytest.raises(DataError, match="its index is torn; remove the folder"):
        Documents([torn], "train").segments(0, 20)
