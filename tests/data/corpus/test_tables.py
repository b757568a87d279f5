"""Parquet files, Hub datasets, zstd and token files: read as their own libraries wrote them."""

import json
import sys

import numpy as np
import pytest

from openpalm.data.corpus import line_streams, tables
from openpalm.data.corpus.document_reader import read_documents
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError

TEXTS = ["one", "größer 日本\n", "", "three " * 500] * 40


def texts(*inputs, **options):
    return [document.text for document in read_documents([str(i) for i in inputs], **options)]


def ids(path, **options):
    return [document.ids.tolist() for document in read_documents([str(path)], **options)]


def run(given, out, tokenizer="byte", **options):
    request = PrepareRequest(inputs=[str(given)], out=out, tokenizer=str(tokenizer), **options)
    return prepare(request)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def table(tmp_path):
    """Writes columns as PATH.parquet by pyarrow."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def write(columns, name="a.parquet", **options):
        parquet.write_table(pyarrow.table(columns), tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 7, "use_dictionary": False},
        {"compression": "zstd", "data_page_size": 64, "version": "1.0"},
    ],
)
def test_a_row_is_a_document(options, table):
    path = table({"id": list(range(len(TEXTS))), "body": TEXTS}, **options)
    found = list(read_documents([str(path)], text_field="body"))
    assert [document.text for document in found] == TEXTS
    assert found[9].place == f"{path}:row 10"


def test_parquet_and_zstd_give_the_tokens_of_the_same_jsonl(table, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = jsonl({"text": text} for text in TEXTS + [f"more {i}" for i in range(300)])
    (tmp_path / "a.jsonl").write_bytes(rows)
    half = len(rows) // 2
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(rows[:half]) + compress(rows[half:]))
    table({"text": [json.loads(row)["text"] for row in rows.splitlines()]})
    wanted = run(tmp_path / "a.jsonl", tmp_path / "jsonl")
    for name in ("a.jsonl.zst", "a.parquet"):
        assert run(tmp_path / name, tmp_path / f"out-{name}").splits == wanted.splits


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_token_ids_are_taken_as_they_are(dtype, table, tmp_path):
    import pyarrow

    byte = Tokenizer.byte()
    rows = [byte.encode(f"row {i} of ids") + [byte.end_of_text] * (i % 2) for i in range(300)]
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(dtype))
    path = table({"input_ids": pyarrow.array(rows, kind), "attention_mask": rows})
    assert ids(path) == rows
    manifest = run(path, tmp_path / "out", val="tail:0.2")
    dataset = open_dataset(tmp_path / "out")
    tokens = np.concatenate([dataset.tokens(split)[:] for split in ("train", "val")])
    assert tokens.tolist() == [i for row in rows for i in row]
    assert manifest.documents.read == 300
    text = sum(split.bytes for split in manifest.splits.values())
    assert text == sum(len(row) - row.count(byte.end_of_text) for row in rows)
    starts = dataset.document_offsets("train").tolist()
    assert starts[:3] == [0, len(rows[0]), len(rows[0]) + len(rows[1])]


@pytest.mark.parametrize(
    ("row", "tokenizer", "says"),
    [
        ([1, 265], "byte", "row 2: holds id 265, the vocabulary ends at 264"),
        ([1, -1], "byte", "row 2: field 'input_ids' holds numbers that are no token ids"),
        ([1, 2], "bpe:300", "row 1: holds token ids, not text; name the tokenizer"),
        ([1, None], "byte", "row 2: field 'input_ids' is a NoneType, neither a text nor"),
    ],
)
def test_ids_are_checked_against_the_vocabulary(row, tokenizer, says, table, tmp_path):
    path = table({"input_ids": [[1, 2], row]})
    with pytest.raises(DataError, match=says):
        run(path, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_other_columns_are_refused(table):
    for columns, says in (
        ({"body": ["a"]}, "no field 'text'; it has 'body'; name one with --text-field"),
        ({"text": [1]}, "row 1: field 'text' is a int, neither a text nor token ids"),
        ({"text": [None, "a"]}, "row 1: field 'text' is a NoneType"),
        ({"text": [[0.5]]}, "row 1: field 'text' is a ndarray, neither"),
        ({"text": [{"a": "b"}]}, "row 1: field 'text' is a dict"),
    ):
        with pytest.raises(DataError, match=says):
            texts(table(columns))


def test_damaged_parquet_is_named(table):
    path = table({"text": [f"{i}" * 99 for i in range(3000)]}, use_dictionary=False)
    data = path.read_bytes()
    for torn in (b"", data[:-9], data[9:], data[:400] + bytes(4000) + data[4400:], b"PAR1" * 9):
        path.write_bytes(torn)
        with pytest.raises(DataError, match=r"a\.parquet: (parquet data damaged|is empty)"):
            texts(path)


def test_row_groups_above_the_size_limit_are_not_read(table, monkeypatch):
    path = table({"text": ["a" * 100] * 1000}, use_dictionary=False)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "MAX_CHUNK_VALUES", 999)
        with pytest.raises(DataError, match="1000 values in one row group, the limits are"):
            texts(path)
    monkeypatch.setattr(tables, "MAX_CHUNK_BYTES", 1000)
    with pytest.raises(DataError, match="bytes, 1000 values in one row group"):
        texts(path)


def test_a_text_repeated_in_a_small_file_is_not_repeated_in_memory(table):
    pyarrow = pytest.importorskip("pyarrow")
    path = table({"text": ["a" * (2 << 20)] * 500}, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 8 << 20
    pool = pyarrow.system_memory_pool()
    before = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        assert next(iter(read_documents([str(path)]))).text == "a" * (2 << 20)
        assert pool.max_memory() < 64 << 20
    finally:
        pyarrow.set_memory_pool(before)


def test_damaged_zstd_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor(write_checksum=True).compress(jsonl({"text": t} for t in TEXTS))
    path = tmp_path / "a.jsonl.zst"
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    for torn in (data[:-1], data[:20], data + b"junk", b"junk", flipped, data + data[:9]):
        path.write_bytes(torn)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: zstd data damaged"):
            texts(path)
    path.write_bytes(data)
    assert texts(path) == TEXTS


def test_zstd_windows_and_bombs_are_bounded(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    bomb = b'{"text": "' + b"a" * (200 << 20)
    path.write_bytes(zstandard.ZstdCompressor().compress(bomb))
    monkeypatch.setattr("openpalm.data.corpus.json_lines.MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match=":1: a line of more than 1048576 bytes"):
        texts(path)
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=26)
    rows = jsonl({"text": f"{i}" * 50} for i in range(1000))
    compressor = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    path.write_bytes(compressor.compress(rows) + compressor.flush())
    assert len(texts(path)) == 1000
    monkeypatch.setattr(line_streams, "MAX_ZSTD_WINDOW_BYTES", 1 << 20)
    with pytest.raises(DataError, match="made with a window of more than"):
        texts(path)


@pytest.mark.parametrize(
    ("name", "missing", "says"),
    [
        ("a.parquet", "pyarrow", r"needs pyarrow; pip install 'openpalm\[data\]'"),
        ("a.jsonl.zst", "zstandard", r"needs zstandard; pip install 'openpalm\[data\]'"),
        ("hub:some/thing", "datasets", r"needs datasets; pip install 'openpalm\[hub\]'"),
    ],
)
def test_a_missing_extra_is_named(name, missing, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=says):
        texts(name if name.startswith("hub:") else tmp_path / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset's folder, read by the `datasets` library itself."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"text {i}", "input_ids": [i, 2, 3]} for i in range(250)]
    (folder / "train.jsonl").write_bytes(jsonl(rows))
    (folder / "test.jsonl").write_bytes(jsonl(rows[:9]))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_datasets_of_the_hub_are_streamed(hub, tmp_path):
    assert texts(f"hub:{hub}") == [f"text {i}" for i in range(250)]
    assert texts(f"hub:{hub}:test") == [f"text {i}" for i in range(9)]
    assert texts(f"hub:{hub}:default:test") == [f"text {i}" for i in range(9)]
    assert ids(f"hub:{hub}:test", text_field="missing")[8] == [8, 2, 3]
    manifest = run(f"hub:{hub}", tmp_path / "out")
    same = run(hub / "train.jsonl", tmp_path / "file")
    assert manifest.splits == same.splits
    assert run(f"hub:{hub}", tmp_path / "out").unchanged


@pytest.mark.filterwarnings("ignore")
def test_datasets_that_cannot_be_read_are_one_line(hub, tmp_path):
    for name in (f"{hub}:nosplit", f"{tmp_path}/none"):
        with pytest.raises(DataError, match=f"hub:{name}: cannot be read") as error:
            texts(f"hub:{name}")
        assert "\n" not in str(error.value)
    (hub / "test.jsonl").write_text("{torn")
    with pytest.raises(DataError, match="cannot be read"):
        texts(f"hub:{hub}:test")
    for file in hub.iterdir():
        file.write_bytes(jsonl([{"a": "b"}]))
    with pytest.raises(DataError, match="no field 'body'; it has 'a'; name one"):
        texts(f"hub:{hub}:test", text_field="body")


def token_files(folder, train, val):
    """As nanoGPT's prepare.py writes them."""
    folder.mkdir()
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"never read")
    return folder


def test_token_files_keep_their_own_split(tmp_path, monkeypatch):
    byte = Tokenizer.byte()
    train, val = (
        [i for n in range(count) for i in [*byte.encode(f"document {n}"), byte.end_of_text]]
        for count in (900, 50)
    )
    folder = token_files(tmp_path / "set", train, val)
    monkeypatch.setattr("openpalm.data.corpus.document_reader.BLOCK_BYTES", 1000)
    manifest = run(folder, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokens("train")[:].tolist() == train
    assert dataset.tokens("val")[:].tolist() == val
    assert manifest.split_by == "files"
    assert manifest.splits["train"].documents == 900
    ends = np.flatnonzero(np.array(train) == byte.end_of_text)
    assert dataset.document_offsets("train").tolist() == [0, *(ends[:-1] + 1)]


def test_a_token_file_alone_is_split_by_its_tail(tmp_path):
    folder = token_files(tmp_path / "set", list(range(256)) * 40, [1, 2])
    run(folder / "train.bin", tmp_path / "out", val="tail:0.25")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokens("val")[:].tolist() == list(range(256)) * 10


def test_token_files_that_cannot_be_used(tmp_path):
    folder = token_files(tmp_path / "set", [1, 2, 300], [1, 2])
    (tmp_path / "a.txt").write_text("text " * 99)
    with pytest.raises(DataError, match=r"train\.bin: holds id 300, the vocabulary ends at 264"):
        run(folder, tmp_path / "out")
    with pytest.raises(DataError, match=r"train\.bin: holds token ids, not text; name"):
        run(folder, tmp_path / "out", "bpe:300")
    with pytest.raises(DataError, match="keep their own split; prepare them alone"):
        texts(folder, tmp_path / "a.txt")
    np.array([1, 2], dtype=np.uint16).tofile(folder / "train.bin")
    for odd in (b"", b"abc"):
        (folder / "val.bin").write_bytes(odd)
        with pytest.raises(DataError, match=r"val\.bin: not uint16 token ids \(\d bytes\)"):
            run(folder, tmp_path / "out")
