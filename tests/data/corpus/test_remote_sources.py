"""Inputs at URLs give what the same files give on disk."""

import gzip
import json

import fsspec
import pytest

from openpalm.base import remote
from openpalm.data.corpus.document_reader import read_documents
from openpalm.data.corpus.line_streams import Unavailable
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError, StorageError


@pytest.fixture
def both(tmp_path):
    """A folder of files of several kinds on disk, and the same at memory://in."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    files = fsspec.filesystem("memory")
    files.store.clear()
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    rows = "".join(json.dumps({"text": f"row {i} größer"}) + "\n" for i in range(90))
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.replace("row", "line").encode()))
    parquet.write_table(
        pyarrow.table({"text": [f"cell {i}" for i in range(50)]}), folder / "c.parquet"
    )
    (folder / "deep" / "d.txt").write_text("One text é.\n" * 5000)
    (folder / "config.json").write_text('{\n"a": 1}\n')
    (folder / ".hidden.txt").write_text("hidden")
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files.pipe_file(f"/in/{name}", path.read_bytes())
    yield folder
    files.store.clear()


def texts(*inputs):
    return [document.text for document in read_documents([str(one) for one in inputs])]


def test_documents_are_those_of_the_files(both):
    for name in ("", "a.jsonl", "b.jsonl.gz", "c.parquet", "deep/d.txt"):
        assert texts(f"memory://in/{name}".rstrip("/")) == texts(both / name)
    assert texts("memory://in/*.jsonl*") == texts(f"{both}/*.jsonl*")
    assert texts(f"file://{both}") == texts(both)


def test_a_prepared_dataset_is_that_of_the_files(both, tmp_path):
    for given, out in ((str(both), "disk"), ("memory://in", "url")):
        prepare(PrepareRequest(inputs=[given], out=tmp_path / out, tokenizer="byte"))
    disk, url = (open_dataset(tmp_path / name).manifest for name in ("disk", "url"))
    assert disk.splits == url.splits
    assert disk.inputs[0].sha256 == url.inputs[0].sha256
    assert url.inputs[0].given == "memory://in"
    again = PrepareRequest(inputs=["memory://in"], out=tmp_path / "url", tokenizer="byte")
    assert prepare(again).unchanged
    assert prepare(again).left_out == {"hidden": 1, "of another kind": 1}


def test_what_cannot_be_read_is_one_line(both, tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match=r"memory://in/none.txt: no such file"):
        texts("memory://in/none.txt")
    with pytest.raises(DataError, match=r"memory://in/\*.md: no file of text here"):
        texts("memory://in/*.md")
    size = (both / "a.jsonl").stat().st_size
    monkeypatch.setattr(
        remote, "remote_files", lambda url: ([remote.RemoteFile(url, size + 10)], True)
    )
    monkeypatch.setattr("openpalm.data.corpus.sources.remote_files", remote.remote_files)
    short = PrepareRequest(inputs=["memory://in/a.jsonl"], out=tmp_path / "o", tokenizer="byte")
    with pytest.raises(StorageError, match=r"memory://in/a.jsonl: cannot be read \(ends at byte"):
        prepare(short)

    def forbidden(self, path, *args, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", forbidden)
    says = r"memory://in/a.jsonl: cannot be read \(not permitted: Access Denied; check the cred"
    with pytest.raises(Unavailable, match=says):
        prepare(short)
