import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from data_samples import TEXTS, shared_file

from openpalm.data.corpus import document_reader as corpus_file
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare import encoding, preparation, progress_file, writing
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, StorageError


def corpus(path, count, *, prefix="document"):
    """A .jsonl of `count` distinct documents of several lengths and scripts."""
    texts = [f"{prefix} {i}: " + "größer 日本 word " * (i % 13) + "end" for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def run(tmp_path, *inputs, out="out", **options):
    options = {"tokenizer": "byte", **options}
    given = [str(one) for one in inputs]
    return prepare(PrepareRequest(inputs=given, out=tmp_path / out, **options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(dataset, split):
    """The texts of a split, each without its end marker."""
    tokenizer, tokens = dataset.tokenizer(), dataset.tokens(split)
    starts = [*dataset.document_offsets(split), len(tokens)]
    ids = [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
    return [tokenizer.decode(one[:-1] if one[-1] == tokenizer.end_of_text else one) for one in ids]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_the_splits_are_the_documents(tokenizer, tmp_path):
    texts = corpus(tmp_path / "a.jsonl", 500)
    manifest = run(tmp_path, tmp_path / "a.jsonl", tokenizer=tokenizer, val_fraction=0.1)
    dataset = open_dataset(tmp_path / "out")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in set(train)] == train
    assert 20 < len(val) < 90
    assert manifest == dataset.manifest
    assert manifest.split_by == "hash"
    for split, found in (("train", train), ("val", val)):
        entry = manifest.splits[split]
        lengths = dataset.tokenizer().byte_lengths()
        assert entry.documents == len(found)
        assert entry.bytes == sum(len(text.encode()) for text in found)
        assert entry.bytes == lengths[dataset.tokens(split)[:]].sum()
        ends = dataset.tokens(split)[:] == dataset.tokenizer().end_of_text
        assert ends.sum() == len(found)
        assert ends[-1]


def test_a_document_never_changes_sides(tmp_path):
    corpus(tmp_path / "a.jsonl", 400)
    more = corpus(tmp_path / "b.jsonl", 300, prefix="other")
    run(tmp_path, tmp_path / "a.jsonl", out="one")
    run(tmp_path, tmp_path / "b.jsonl", tmp_path / "a.jsonl", out="two", dedup="none")
    one, two = (set(documents(open_dataset(tmp_path / out), "val")) for out in ("one", "two"))
    assert one == {text for text in two if text not in set(more)}
    assert one


def test_few_documents_are_split_by_the_tail_inside_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("日本語" * 100)
    manifest = run(tmp_path, tmp_path / "a.txt", val_fraction=0.1)
    dataset = open_dataset(tmp_path / "out")
    (train,), (val,) = documents(dataset, "train"), documents(dataset, "val")
    assert train + val == "日本語" * 100
    assert len(val.encode()) == 90
    assert manifest.split_by == "tail"
    assert dataset.tokens("train")[-1:] != 256  # the text goes on
    assert dataset.tokens("val")[-1:] == 256


@pytest.mark.parametrize("fraction", [0.0001, 0.013, 0.3, 0.5, 0.77])
def test_the_tail_keeps_characters_whole_and_loses_none(fraction, tmp_path):
    texts = corpus(tmp_path / "a.jsonl", 250)
    manifest = run(tmp_path, tmp_path / "a.jsonl", val=f"tail:{fraction:f}")
    dataset = open_dataset(tmp_path / "out")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert "".join(train + val) == "".join(texts)
    assert "\ufffd" not in "".join(val)
    total = sum(len(text.encode()) for text in texts)
    assert manifest.splits["train"].bytes + manifest.splits["val"].bytes == total
    assert abs(manifest.splits["val"].bytes - fraction * total) <= 4


def test_a_seam_between_documents_cuts_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n{"text": "bbbb"}\n')
    run(tmp_path, tmp_path / "a.jsonl", val="tail:0.5")
    dataset = open_dataset(tmp_path / "out")
    assert (documents(dataset, "train"), documents(dataset, "val")) == (["aaaa"], ["bbbb"])


def test_repeated_and_blank_documents_are_counted(tmp_path):
    texts = ["one", "two", " \n\t", "one", "", "three", "one"] * 60
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    manifest = run(tmp_path, tmp_path / "a.jsonl", val_fraction=0.4)
    counts = manifest.documents
    assert (counts.read, counts.blank, counts.duplicates) == (420, 120, 297)
    dataset = open_dataset(tmp_path / "out")
    assert "".join(documents(dataset, "train") + documents(dataset, "val")) == "onetwothree"
    manifest = run(tmp_path, tmp_path / "a.jsonl", out="all", dedup="none", val_fraction=0.4)
    assert manifest.documents.duplicates == 0
    dataset = open_dataset(tmp_path / "all")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert len(train + val) == 300
    assert not set(train) & set(val)


def test_validation_by_hash_is_never_empty(tmp_path):
    corpus(tmp_path / "a.jsonl", 300)
    manifest = run(tmp_path, tmp_path / "a.jsonl", val_fraction=1e-9)
    assert manifest.splits["val"].documents == 1


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
@pytest.mark.parametrize("shard_tokens", [5, 64, 1000, 10**9])
def test_shards_joined_are_one_shard(tokenizer, shard_tokens, tmp_path):
    corpus(tmp_path / "a.jsonl", 8)
    options = {"tokenizer": tokenizer, "val": "tail:0.1"}
    run(tmp_path, tmp_path / "a.jsonl", out="whole", **options)
    run(tmp_path, tmp_path / "a.jsonl", out="parts", shard_tokens=shard_tokens, **options)
    whole, parts = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "parts")
    for split in ("train", "val"):
        one, many = whole.tokens(split), parts.tokens(split)
        assert len(one) == len(many) == whole.manifest.splits[split].tokens
        assert (one[:] == many[:]).all()
        for a, b in ((0, 0), (3, 17), (6, 8), (-5, None), (10**9, None), (9, 3)):
            assert (one[a:b] == many[a:b]).all()
            assert len(one[a:b]) == len(many[a:b]) == len(range(*slice(a, b).indices(len(one))))
        assert (whole.document_offsets(split) == parts.document_offsets(split)).all()
        sizes = [file.size for file in parts.manifest.splits[split].files[::2]]
        assert all(size == 2 * shard_tokens for size in sizes[:-1])


def test_tokens_are_sliced_with_step_one(tmp_path):
    corpus(tmp_path / "a.jsonl", 10)
    run(tmp_path, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="step 1"):
        open_dataset(tmp_path / "out").tokens("train")[::2]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_preparing_is_deterministic_byte_for_byte(tokenizer, tmp_path):
    corpus(tmp_path / "a.jsonl", 300)
    command = (
        "import sys; from pathlib import Path; from openpalm.data.prepare.preparation import *;"
        "inputs, out, tokenizer = sys.argv[1:2], Path(sys.argv[2]), sys.argv[3];"
        "prepare(PrepareRequest(inputs=inputs, out=out, tokenizer=tokenizer))"
    )
    for out, seed in (("one", "1"), ("two", "2")):
        words = [sys.executable, "-c", command, tmp_path / "a.jsonl", tmp_path / out, tokenizer]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_batches_do_not_change_the_tokens(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 50))
    run(tmp_path, tmp_path / "a.txt", out="one", tokenizer="bpe:400")
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 50)
    monkeypatch.setattr("openpalm.data.text.byte_level.PIECE_CHARACTERS", 30)
    run(tmp_path, tmp_path / "a.txt", out="two", tokenizer="bpe:400")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_vocabulary_is_learnt_without_validation_text(tmp_path):
    texts = corpus(tmp_path / "a.jsonl", 300)
    run(tmp_path, tmp_path / "a.jsonl", tokenizer="bpe:500")
    dataset = open_dataset(tmp_path / "out")
    train = documents(dataset, "train")
    assert dataset.manifest.tokenizer == Tokenizer.train_bpe(train, 500).digest
    assert dataset.manifest.tokenizer != Tokenizer.train_bpe(texts, 500).digest

    (tmp_path / "b.txt").write_text("training text " * 90 + "QZQZ" * 30)
    run(tmp_path, tmp_path / "b.txt", out="tail", tokenizer="bpe:300", val="tail:0.1")
    learnt = open_dataset(tmp_path / "tail").tokenizer().token_bytes
    assert b" training" in learnt
    assert b"QZ" not in learnt


def test_ids_above_65535_are_four_bytes_wide(tmp_path):
    content = json.loads(Tokenizer.byte()._canonical)
    content["added_tokens"][-1]["id"] = 70_000
    content["model"]["vocab"] |= {f"unused {i}": i for i in range(265, 70_000)}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("wide " * 50)
    manifest = run(tmp_path, tmp_path / "a.txt", tokenizer=str(path))
    assert manifest.dtype == "uint32"
    assert manifest.vocab_size > 1 << 16
    dataset = open_dataset(tmp_path / "out")
    assert "".join(documents(dataset, "train") + documents(dataset, "val")) == "wide " * 50


def test_the_manifest_says_what_the_inputs_were(tmp_path):
    corpus(tmp_path / "a.jsonl", 5)
    (tmp_path / "f").mkdir()
    for name in "xy":
        (tmp_path / "f" / f"{name}.txt").write_text(name * 50)
    manifest = run(tmp_path, tmp_path / "a.jsonl", tmp_path / "f", "builtin:python-docs")
    file, folder, builtin = manifest.inputs
    data = (tmp_path / "a.jsonl").read_bytes()
    assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    digests = [hashlib.sha256((name * 50).encode()).hexdigest() for name in "xy"]
    listing = "".join(f"{digest}\n" for digest in digests).encode()
    assert folder.sha256 == hashlib.sha256(listing).hexdigest()
    assert (folder.files, folder.bytes) == (2, 100)
    assert builtin.given == "builtin:python-docs"
    for name, content in contents(tmp_path / "out").items():
        if name not in ("manifest.json", "tokenizer.json"):
            (entry,) = (f for s in manifest.splits.values() for f in s.files if f.name == name)
            assert entry.sha256 == hashlib.sha256(content).hexdigest()
    tokenizer = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert manifest.tokenizer == hashlib.sha256(tokenizer).hexdigest()


def test_preparing_again_changes_nothing(tmp_path):
    corpus(tmp_path / "a.jsonl", 20)
    first = run(tmp_path, tmp_path / "a.jsonl")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    again = run(tmp_path, tmp_path / "b.jsonl")
    assert (first.unchanged, again.unchanged) == (False, True)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_tokenizer_file_is_the_same_wherever_it_lies(tmp_path, bpe):
    corpus(tmp_path / "a.jsonl", 20)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bpe.save(tmp_path / name / "tokenizer.json")
    run(tmp_path, tmp_path / "a.jsonl", tokenizer=str(tmp_path / "one"))
    assert run(tmp_path, tmp_path / "a.jsonl", tokenizer=str(tmp_path / "two")).unchanged


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"tokenizer": "bpe:300"}, "tokenizer"),
        ({"val_fraction": 0.2, "dedup": "none"}, "val_fraction, dedup"),
        ({"val": "tail:0.1"}, "val"),
        ({}, "inputs"),
    ],
)
def test_another_dataset_is_not_overwritten(options, differing, tmp_path):
    corpus(tmp_path / "a.jsonl", 20)
    run(tmp_path, tmp_path / "a.jsonl")
    before = contents(tmp_path / "out")
    if not options:
        corpus(tmp_path / "a.jsonl", 21)
    with pytest.raises(DataError, match=rf"another dataset \(other {differing}\); choose another"):
        run(tmp_path, tmp_path / "a.jsonl", **options)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "train-00000.bin"])
def test_foreign_files_are_not_touched(name, tmp_path):
    corpus(tmp_path / "a.jsonl", 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    with pytest.raises(DataError, match=f"holds {name}, which is not ours"):
        run(tmp_path, tmp_path / "a.jsonl")
    assert contents(tmp_path / "out") == {name: b"precious"}


@pytest.mark.parametrize("out", ["a.jsonl", "a.jsonl/deeper/still"])
def test_a_file_in_place_of_the_folder(out, tmp_path):
    corpus(tmp_path / "a.jsonl", 20)
    with pytest.raises(DataError, match=r"a\.jsonl is a file; name a folder"):
        run(tmp_path, tmp_path / "a.jsonl", out=out)


def test_inputs_may_not_lie_in_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    corpus(tmp_path / "out" / "a.jsonl", 20)
    (tmp_path / "out" / progress_file.PARTIAL).touch()
    (tmp_path / "out" / "a.jsonl").rename(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(DataError, match="is inside --out"):
        run(tmp_path, tmp_path / "out" / "tokenizer.json")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def fail_on_write(monkeypatch, error, after):
    written = 0
    write = writing._HashedFile.write

    def failing(self, data):
        nonlocal written
        written += 1
        if written > after:
            raise error
        write(self, data)

    monkeypatch.setattr(writing._HashedFile, "write", failing)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_after_a_full_disk_the_same_command_goes_on(after, tmp_path, monkeypatch):
    corpus(tmp_path / "a.jsonl", 100)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_file, "BLOCK_BYTES", 1000)
        fail_on_write(patch, OSError(errno.ENOSPC, "No space left on device"), after)
        with pytest.raises(StorageError, match=r"No space left on device\); free some space"):
            run(tmp_path, tmp_path / "a.jsonl")
        with pytest.raises(DataError, match=r"no prepared dataset here \(no manifest.json\)"):
            open_dataset(tmp_path / "out")
    monkeypatch.setattr(corpus_file, "BLOCK_BYTES", 1000)
    run(tmp_path, tmp_path / "a.jsonl")
    run(tmp_path, tmp_path / "a.jsonl", out="at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    corpus(tmp_path / "a.jsonl", 20)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(StorageError, match=r"out: cannot be written \(Permission denied\)"):
        run(tmp_path, tmp_path / "a.jsonl")


def test_two_at_once_do_not_mix(tmp_path):
    corpus(tmp_path / "a.jsonl", 20)
    with (
        progress_file.claim_folder(tmp_path / "out", {}),
        pytest.raises(DataError, match="another process is preparing it"),
    ):
        run(tmp_path, tmp_path / "a.jsonl")
    run(tmp_path, tmp_path / "a.jsonl")
    with (
        pytest.raises(DataError, match="has just prepared it"),
        progress_file.claim_folder(tmp_path / "out", {}),
    ):
        pass
    assert open_dataset(tmp_path / "out").manifest.documents.read == 20


FAILURES = {
    errno.EIO: (StorageError, r"b\.\w+: cannot be read \(.*Input/output error"),
    errno.EACCES: (DataError, r"b\.\w+: cannot be read \(.*Permission denied"),
    errno.ENOENT: (DataError, r"b\.\w+: no such file or folder"),
}


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("number", FAILURES)
def test_a_source_that_cannot_be_read_now_keeps_what_was_done(number, kind, tmp_path, monkeypatch):
    """In the first pass or the second: the source is named, not --out, and nothing is removed."""
    corpus(tmp_path / "a.jsonl", 200)
    second = tmp_path / f"b.{kind}"
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"text": f"row {i}"} for i in range(50)]), second)
    else:
        corpus(second, 50, prefix="other")
    inputs = [tmp_path / "a.jsonl", second]
    monkeypatch.setattr(progress_file, "CHECKPOINT_S", 0.0)
    expected, says = FAILURES[number]
    for fails_at in (1, 2):
        with monkeypatch.context() as patch:
            fail_to_open(patch, second, number, fails_at)
            with pytest.raises(expected, match=says) as caught:
                run(tmp_path, *inputs)
        assert "--out" not in str(caught.value)
        first = (tmp_path / "out" / progress_file.PARTIAL).read_bytes().splitlines()
        assert [json.loads(line)["scanned"]["name"] for line in first if b'"scanned"' in line] == [
            str(source) for source in inputs[:fails_at]
        ]
    run(tmp_path, *inputs)
    run(tmp_path, *inputs, out="at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def fail_to_open(patch, path, number, at):
    """In pass `at`, `path` cannot be opened: the error of the system."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        owner, name, opens_a_pass = parquet, "ParquetFile", 2
    else:
        owner, name, opens_a_pass = type(path), "open", 1
    count, unpatched = 0, getattr(owner, name)

    def opened(given, *more, **options):
        nonlocal count
        count += given == path
        if given == path and count == opens_a_pass * at:
            raise OSError(number, os.strerror(number), str(path))
        return unpatched(given, *more, **options)

    patch.setattr(owner, name, opened)


@pytest.mark.parametrize("change", ["edit", "append", "shorten"])
def test_inputs_that_change_meanwhile_are_noticed(change, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    corpus(path, 20)
    rows = path.read_text().splitlines(keepends=True)
    changed = {
        "edit": [rows[0].replace("0", "1"), *rows[1:]],
        "append": rows + rows[:1],
        "shorten": rows[:-1],
    }
    planned = preparation.scan

    def changing(*args, **options):
        plan = planned(*args, **options)
        path.write_text("".join(changed[change]))
        return plan

    monkeypatch.setattr(preparation, "scan", changing)
    with pytest.raises(DataError, match="changed while it was being read"):
        run(tmp_path, path)
    assert not (tmp_path / "out").exists()


def test_bad_input_writes_nothing(tmp_path):
    corpus(tmp_path / "a.jsonl", 300)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:301: no field 'text'"):
        run(tmp_path, tmp_path / "a.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "no text in 1 document;"),
        ("a", "too little text: 0 tokens for the train split, at least 2"),
        ("ab", "too little text: 1 token for the train split"),
    ],
)
def test_tiny_inputs(text, says, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=says):
        run(tmp_path, tmp_path / "a.txt")
    assert not (tmp_path / "out").exists()


def test_everything_held_out(tmp_path):
    corpus(tmp_path / "a.jsonl", 300)
    with pytest.raises(DataError, match="leaves no document to train on"):
        run(tmp_path, tmp_path / "a.jsonl", val_fraction=1 - 1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_fraction": 0.0}, "--val-fraction 0.0: must be between 0 and 1"),
        ({"val_fraction": float("nan")}, "--val-fraction nan"),
        ({"val": "tail"}, "--val tail: must be hash or tail:F"),
        ({"val": "tail:0.0"}, "--val tail:0.0"),
        ({"val": "tail:1.5"}, "--val tail:1.5"),
        ({"dedup": "fuzzy"}, "--dedup fuzzy: must be exact or none"),
        ({"shard_tokens": 0}, "shard_tokens 0"),
        ({"tokenizer": "bpe:9"}, "tokenizer bpe:9: VOCAB must be"),
    ],
)
def test_values_out_of_range(options, says, tmp_path):
    with pytest.raises(DataError, match=says):
        run(tmp_path, tmp_path / "a.jsonl", **options)


def test_a_missing_tokenizer_is_noticed_before_the_inputs_are_read(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer"):
        run(tmp_path, tmp_path / "a.jsonl", tokenizer=str(tmp_path / "t.json"))


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_file, "BLOCK_BYTES", 1 << 16)

    def peak(count):
        """Bytes at the most, and bytes of the text."""
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"text": f"{i} " + "some words " * 300}) + "\n")
        tracemalloc.start()
        run(tmp_path, path, out=f"out-{count}")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, path.stat().st_size

    peak(300)  # imports and caches
    (some, little), (more, much) = peak(500), peak(5000)
    assert more - some < 0.1 * (much - little)  # how much is in flight depends on the threads


def test_progress_reaches_the_end_and_never_falls(tmp_path):
    corpus(tmp_path / "a.jsonl", 300)
    told = []
    request = PrepareRequest(
        inputs=[str(tmp_path / "a.jsonl")], out=tmp_path / "out", tokenizer="bpe:300"
    )
    prepare(request, lambda done, total: told.append((done, total)))
    total = 3 * (tmp_path / "a.jsonl").stat().st_size
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_a_real_text_is_prepared_exactly(tmp_path):
    text = shared_file("tinyshakespeare.txt")
    manifest = run(tmp_path, text, tokenizer="bpe:1024")
    dataset = open_dataset(tmp_path / "out")
    (train,), (val,) = documents(dataset, "train"), documents(dataset, "val")
    assert (train + val).encode() == text.read_bytes()
    splits = manifest.splits.values()
    assert sum(split.bytes for split in splits) == text.stat().st_size
    assert np.dtype(manifest.dtype) == np.uint16
