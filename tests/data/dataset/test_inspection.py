import pytest

from openpalm.data.dataset.inspection import inspect_dataset
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError


@pytest.fixture
def dataset(tmp_path):
    for i in range(1, 10):
        (tmp_path / f"{i}.txt").write_text(str(i) * 10 * i)
    out = tmp_path / "out"
    prepare(PrepareRequest(inputs=[str(tmp_path)], out=out, tokenizer="byte", val="tail:0.2"))
    return open_dataset(out)


def test_figures_and_samples(dataset):
    found = inspect_dataset(dataset, samples=2)
    train = found.splits["train"]
    # 450 bytes, of which the tail's 90 are nines; nine documents have eight ends before the seam.
    assert (train.documents, train.bytes, train.tokens) == (8, 360, 368)
    assert train.bytes_per_token == round(360 / 368, 3)
    assert train.length_percentiles == {"p0": 11, "p10": 21, "p50": 51, "p90": 71, "p100": 81}
    assert train.samples == ["1" * 10, "8" * 64]
    assert found.splits["val"].samples == ["9" * 64]
    assert found.files_checked == 4
    assert inspect_dataset(dataset, samples=0).splits["val"].samples == []


def test_one_flipped_bit_anywhere_is_found(dataset):
    for name in ("train-00000.bin", "train-00000.idx", "val-00000.bin", "val-00000.idx"):
        path = dataset.path / name
        whole = path.read_bytes()
        for position in (0, len(whole) - 1):
            torn = bytearray(whole)
            torn[position] ^= 1
            path.write_bytes(torn)
            with pytest.raises(DataError, match=f"{name}: was altered"):
                inspect_dataset(dataset)
        path.write_bytes(whole)
    inspect_dataset(dataset)


def test_progress_counts_every_byte(dataset):
    told = []
    inspect_dataset(dataset, progress=lambda done, total: told.append((done, total)))
    total = sum(file.size for split in dataset.manifest.splits.values() for file in split.files)
    assert told[-1] == (total, total)
