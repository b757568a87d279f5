import hashlib
import json

import pytest

from openpalm.data.batches.token_mixture import open_sets
from openpalm.data.dataset.document_index import Documents
from openpalm.data.dataset.manifest import own_share
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 50)
    out = tmp_path / "out"
    request = PrepareRequest(inputs=[str(tmp_path / "a.txt")], out=out, tokenizer="byte")
    prepare(request)
    return out


def test_a_manifest_reads_back_as_it_was_written(dataset):
    path = dataset / "manifest.json"
    assert open_dataset(dataset).manifest.to_json() == path.read_bytes()


def test_a_torn_manifest_is_never_taken(dataset):
    path = dataset / "manifest.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is not JSON|is not a manifest"):
            open_dataset(dataset)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "val-00000.bin"])
def test_torn_files_are_named(name, dataset):
    path = dataset / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=f"{name}: .* bytes, the manifest says .* remove the folder"
    ):
        open_dataset(dataset)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        open_dataset(dataset)


CHANGES = {
    "version 2": (lambda m: m.update(version=2), "format version 2, this OpenPaLM reads 1"),
    "another format": (lambda m: m.update(format="x"), "is not a manifest of openpalm-tokens"),
    "unknown field": (lambda m: m.update(extra=1), "unknown setting extra; remove"),
    "missing field": (lambda m: m.pop("dtype"), "missing dtype; remove"),
    "pickle dtype": (lambda m: m.update(dtype="object"), "dtype must be uint16 or uint32"),
    "text for a number": (
        lambda m: m.update(vocab_size="265"),
        "vocab_size '265': must be a whole",
    ),
    "truth for a number": (
        lambda m: m.update(vocab_size=True),
        "vocab_size True: must be a whole",
    ),
    "negative": (
        lambda m: m["documents"].update(read=-1),
        "read -1: must be a whole number, 0",
    ),
    "too many ids": (lambda m: m.update(vocab_size=1 << 40), "does not fit uint16"),
    "no ids": (lambda m: m.update(vocab_size=0), "does not fit uint16"),
    "inputs no list": (lambda m: m.update(inputs={}), "inputs {}: must be a list"),
    "input no object": (
        lambda m: m.update(inputs=[3]),
        r"inputs\[0\] 3: must be a group of",
    ),
    "no val": (lambda m: m["splits"].pop("val"), "splits must be train and val"),
    "a path": (
        lambda m: m["splits"]["val"]["files"][0].update(name="../a.txt"),
        "the files of val are not the ones prepare writes",
    ),
    "no files": (lambda m: m["splits"]["val"].update(files=[]), "the files of val are not"),
    "tokens": (
        lambda m: m["splits"]["train"].update(tokens=10**15),
        "the sizes of train contradict its counts",
    ),
    "documents": (
        lambda m: m["splits"]["train"].update(documents=2),
        "the sizes of train contradict its counts",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_manifests(name, dataset):
    change, says = CHANGES[name]
    path = dataset / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=says) as error:
        open_dataset(dataset)
    assert str(path) in str(error.value)


def test_what_is_no_manifest(dataset):
    path = dataset / "manifest.json"
    for content in (b"[]", b"[" * 100_000, b"\xff", b"3"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is not JSON|is not a manifest"):
            open_dataset(dataset)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="bytes is no manifest"):
        open_dataset(dataset)


def test_folders_that_are_no_dataset(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(DataError, match="no prepared dataset here"):
            open_dataset(path)


def test_another_tokenizer_in_the_folder_is_refused(dataset, bpe):
    opened = open_dataset(dataset)
    assert opened.tokenizer().digest == Tokenizer.byte().digest
    bpe.save(dataset / "tokenizer.json")
    with pytest.raises(DataError, match="is not the one the tokens were made with"):
        opened.tokenizer()


def test_a_torn_index_is_refused(dataset):
    path, manifest = dataset / "train-00000.idx", dataset / "manifest.json"
    for value in (b"\xff" * 8, (10**6).to_bytes(8, "little")):
        before = hashlib.sha256(path.read_bytes()).hexdigest()
        path.write_bytes(value)
        with pytest.raises(DataError, match=r"train-00000\.idx: was altered"):
            open_dataset(dataset).document_offsets("train")
        # A manifest that was changed with it.
        text = manifest.read_text().replace(before, hashlib.sha256(value).hexdigest())
        manifest.write_text(text)
        with pytest.raises(DataError, match="the index of train is torn"):
            open_dataset(dataset).document_offsets("train")


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_a_file_altered_in_place_is_refused_where_it_is_read(dataset, name):
    """One bit, the size unchanged, in the middle of the file."""
    opened = open_dataset(dataset)
    opened.tokens("train")
    data = bytearray((dataset / name).read_bytes())
    data[len(data) // 2] ^= 1
    (dataset / name).write_bytes(data)
    opened.tokens("val")
    for read in (
        opened.tokens,
        opened.document_offsets,
        lambda split: Documents([opened], split),
        open_sets(dataset).tokens,
    ):
        with pytest.raises(DataError, match=f"{name}: was altered, its SHA-256 is not"):
            read("train")


def test_the_processes_of_a_machine_divide_the_files(dataset, monkeypatch):
    files = open_dataset(dataset).manifest.splits["train"].files
    assert own_share(files) == files
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        shares += own_share(files)
    assert sorted(shares, key=str) == sorted(files, key=str)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_share(files) == files
