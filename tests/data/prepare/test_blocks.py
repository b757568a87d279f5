"""Blocks hold the tokens of the text, in rows of one length, whatever happens on the way."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_samples import shared_file

from openpalm.data.corpus import document_reader
from openpalm.data.dataset import blocks as reading
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare import blocks as writing
from openpalm.data.prepare import progress_file
from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError, StorageError

parquet = pytest.importorskip("pyarrow.parquet")


class Killed(BaseException):
    """What no handler of ours expects."""


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several blocks of documents, row groups and files even for a small text."""
    monkeypatch.setattr(document_reader, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(progress_file, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(reading, "GROUP_TOKENS", 256)
    monkeypatch.setattr(reading, "FILE_GROUPS", 8)


@pytest.fixture
def rows(tmp_path):
    """300 documents, among them one blank and one repeated."""
    texts = [f"document {i}: " + "größer 日本 word\nline " * (i % 13) for i in range(300)]
    texts[7:9] = [" ", texts[3]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def request(path, out, *, seq_len=64, seed=None, rest="drop", **options):
    options = {"tokenizer": "byte", "val": "tail:0.2", **options}
    prepared = PrepareRequest(inputs=[str(path)], out=out, **options)
    return BlocksRequest(prepare=prepared, sequence_length=seq_len, seed=seed, rest=rest)


def make(path, out, **options):
    return write_blocks(request(path, out, **options))


def rows_of(out, split):
    """The rows as another reader sees them: pyarrow, without our code."""
    files = sorted(out.glob(f"{split}-*.parquet"))
    return [row for file in files for row in parquet.read_table(file)["input_ids"].to_pylist()]


def contents(folder, names=None):
    paths = [folder / name for name in names] if names else folder.iterdir()
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("rest", ["drop", "keep"])
def test_rows_joined_are_the_tokens_that_prepare_writes(rest, rows, tmp_path):
    manifest = make(rows, tmp_path / "b", rest=rest)
    prepared = PrepareRequest(
        inputs=[str(rows)], out=tmp_path / "p", tokenizer="byte", val="tail:0.2"
    )
    prepare(prepared)
    for split in ("train", "val"):
        tokens = open_dataset(tmp_path / "p").tokens(split)[:].tolist()
        found = rows_of(tmp_path / "b", split)
        assert {len(row) for row in found[:-1]} == {64}
        joined = list(itertools.chain(*found))
        kept = len(tokens) // 64 * 64 if rest == "drop" else len(tokens)
        assert joined == tokens[:kept]
        assert len(tokens) % 64  # so that there is a rest to speak of
        assert manifest.rest[split] == len(tokens) - kept
        assert manifest.splits[split].tokens == kept
        # The byte tokenizer: bytes are the tokens that are no end marker.
        assert manifest.splits[split].bytes == sum(i < 256 for i in joined)
        marker = open_dataset(tmp_path / "p").tokenizer().end_of_text
        starts = [0, *(i + 1 for i, token in enumerate(joined) if token == marker)]
        assert manifest.splits[split].documents == sum(start < kept for start in starts)
    assert len(list((tmp_path / "b").glob("train-*.parquet"))) > 2


def test_the_ids_of_a_published_tokenizer_are_those_of_its_library(tmp_path):
    import tokenizers

    definition = shared_file("gpt-neox-20b-tokenizer.json")
    text = shared_file("tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
    texts = [text[i : i + 700] for i in range(0, len(text), 700)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make(path, tmp_path / "b", seq_len=100, tokenizer=str(definition), rest="keep")
    inner = tokenizers.Tokenizer.from_file(str(definition))
    end = inner.token_to_id("<|endoftext|>")
    expected = [i for text in texts for i in [*inner.encode(text).ids, end]]
    both = [*rows_of(tmp_path / "b", "train"), *rows_of(tmp_path / "b", "val")]
    found = list(itertools.chain(*both))
    # Only the split by tail may cut a document, and so one token, in two.
    assert inner.decode(found) == "".join(texts)
    train = list(itertools.chain(*rows_of(tmp_path / "b", "train")))
    assert train[:-2] == expected[: len(train) - 2]
    ours = open_dataset(tmp_path / "b")
    joined = np.concatenate([ours.tokens(split)[:] for split in ("train", "val")])
    assert joined.tolist() == found


def test_a_seed_changes_the_order_of_the_rows_alone(rows, tmp_path):
    make(rows, tmp_path / "text")
    make(rows, tmp_path / "shuffled", seed=42)
    make(rows, tmp_path / "again", seed=42)
    make(rows, tmp_path / "other", seed=43)
    ordered, found = (rows_of(tmp_path / name, "train") for name in ("text", "shuffled"))
    assert found != ordered
    assert sorted(found) == sorted(ordered)
    assert contents(tmp_path / "shuffled") == contents(tmp_path / "again")
    assert rows_of(tmp_path / "other", "train") != found
    moved = sum(abs(ordered.index(row) - i) > 5 for i, row in enumerate(found))
    assert moved > len(found) / 2


def test_a_prepared_dataset_or_blocks_are_cut_as_their_text_is(rows, tmp_path):
    make(rows, tmp_path / "text", seq_len=50, rest="keep")
    options = {"tokenizer": "byte", "val": "tail:0.2"}
    prepare(PrepareRequest(inputs=[str(rows)], out=tmp_path / "p", **options))
    make(tmp_path / "p", tmp_path / "from-tokens", seq_len=50, rest="keep")
    make(rows, tmp_path / "wide", seq_len=200, rest="keep")
    make(tmp_path / "wide", tmp_path / "from-blocks", seq_len=50, rest="keep")
    for name in ("from-tokens", "from-blocks"):
        assert contents(tmp_path / name) == contents(tmp_path / "text")
    assert make(tmp_path / "p", tmp_path / "from-tokens", seq_len=50, rest="keep").unchanged
    with pytest.raises(DataError, match="is the input; choose another --out"):
        make(tmp_path / "p", tmp_path / "p")


def test_prepared_folders_are_no_texts(rows, tmp_path):
    make(rows, tmp_path / "b")
    options = {"tokenizer": "byte", "out": tmp_path / "o"}
    prepare(PrepareRequest(inputs=[str(rows)], **options | {"out": tmp_path / "p"}))
    for name in ("b", "p"):
        with pytest.raises(DataError, match="is prepared already; train on it as it is"):
            prepare(PrepareRequest(inputs=[str(tmp_path / name)], **options))
    # A manifest.json of another program is nothing to us.
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "manifest.json").write_text('{"name": "x",\n"files": 1}')
    (tmp_path / "t" / "a.txt").write_text("some words of text " * 200)
    assert make(tmp_path / "t", tmp_path / "o", tokenizer="byte").documents.read == 1


def until_killed(path, out, after, monkeypatch, **options):
    """Writes blocks up to the call of fsync number `after`; whether it came that far."""
    calls = itertools.count(1)

    def failing(handle):
        if next(calls) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        try:
            make(path, out, **options)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("options", [{}, {"seed": 1, "rest": "keep", "tokenizer": "bpe:300"}])
def test_killed_at_every_durable_moment(options, rows, tmp_path, monkeypatch):
    make(rows, tmp_path / "at-once", **options)
    whole, kills = contents(tmp_path / "at-once"), 0
    for after in range(1, 1000, 19):
        out = tmp_path / f"killed-{after}"
        if not until_killed(rows, out, after, monkeypatch, **options):
            break
        # The last kill comes after the rename of the manifest: nothing is missing then.
        if (out / "manifest.json").exists():
            assert whole.items() <= contents(out, whole).items()
        make(rows, out, **options)
        assert contents(out) == whole
        kills += 1
    assert kills > 4


def test_files_that_are_written_are_not_written_again(rows, tmp_path, monkeypatch):
    out, calls, write = tmp_path / "out", itertools.count(1), writing.atomic_file

    def failing(path):
        if next(calls) == 4:
            raise Killed
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "atomic_file", failing)
        with pytest.raises(Killed):
            make(rows, out)
    before = {path.name: path.stat().st_ino for path in out.glob("*.parquet")}
    assert len(before) == 3
    make(rows, out)
    after = {path.name: path.stat().st_ino for path in out.glob("*.parquet")}
    assert {name: after[name] for name in before} == before


def test_a_full_disk_is_one_line_and_the_work_is_kept(rows, tmp_path, monkeypatch):
    out, calls, write = tmp_path / "out", itertools.count(1), writing.atomic_file

    def full(path):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "atomic_file", full)
        says = r"parquet: cannot be written \(No space left on device\); free some space and repeat"
        with pytest.raises(StorageError, match=says):
            make(rows, out)
    assert len(list(out.glob("*.parquet"))) == 2
    make(rows, out)
    make(rows, tmp_path / "at-once")
    assert contents(out) == contents(tmp_path / "at-once")


SIGKILLED = """
import itertools, os, signal, sys
from openpalm.cli.main import main
from openpalm.data.corpus import document_reader
from openpalm.data.dataset import blocks
from openpalm.data.prepare import blocks as writing
from openpalm.data.prepare import progress_file
document_reader.BLOCK_BYTES, progress_file.CHECKPOINT_S = 4000, 0.0
blocks.GROUP_TOKENS, blocks.FILE_GROUPS = 256, 8
calls, fsync = itertools.count(1), os.fsync
def killing(handle):
    if next(calls) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = killing
main(["data", "blocks", *sys.argv[2:], "--seq_len", "64", "--tokenizer", "byte", "--val",
      "tail:0.2"])
"""


def test_really_killed_several_times(rows, tmp_path):
    for after in (5, 40, 20):
        words = [sys.executable, "-c", SIGKILLED, str(after), rows, "--out", tmp_path / "out"]
        assert subprocess.run(words).returncode == -signal.SIGKILL
    make(rows, tmp_path / "out")
    make(rows, tmp_path / "at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def test_the_same_request_changes_nothing_and_another_is_refused(rows, tmp_path):
    out = tmp_path / "out"
    make(rows, out)
    before = contents(out)
    assert make(rows, out).unchanged
    for options in ({"seq_len": 32}, {"seed": 1}, {"rest": "keep"}):
        with pytest.raises(DataError, match="already holds blocks of 64 tokens, order text"):
            make(rows, out, **options)
    with pytest.raises(DataError, match=r"already holds another dataset \(other tokenizer"):
        make(rows, out, tokenizer="bpe:300")
    rows.write_text(json.dumps({"text": "other text " * 300}) + "\n")
    with pytest.raises(DataError, match=r"already holds another dataset \(other inputs"):
        make(rows, out)
    assert contents(out) == before


@pytest.mark.parametrize("options", [{"seq_len": 32}, {"seed": 1}, {"rest": "keep"}])
def test_unfinished_blocks_of_other_settings_are_kept(options, rows, tmp_path, monkeypatch):
    assert until_killed(rows, tmp_path / "out", 30, monkeypatch)
    with pytest.raises(DataError, match="holds unfinished blocks"):
        make(rows, tmp_path / "out", **options)
    make(rows, tmp_path / "out")
    make(rows, tmp_path / "at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def test_requests_that_cannot_be_met_leave_no_folder(rows, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="fill no block of 100000; give more text, a smaller"):
        make(rows, out, seq_len=100_000)
    with pytest.raises(DataError, match="no field 'body'"):
        make(rows, out, text_field="body")
    with pytest.raises(DataError, match="--seq-len 1: must be 2 to"):
        make(rows, out, seq_len=1)
    with pytest.raises(DataError, match="--seed -1: must be 0 or more"):
        make(rows, out, seed=-1)
    assert not out.exists()
    with pytest.raises(DataError, match="is inside --out"):
        make(rows, tmp_path)
    with pytest.raises(DataError, match=r"holds a.jsonl, which is not ours"):
        make("builtin:python-docs", tmp_path)
