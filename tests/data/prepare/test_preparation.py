"""Workers, jobs and kills: whatever happens on the way, the bytes are the same."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import as_completed

import pytest

from openpalm.base import workers
from openpalm.data.corpus import document_reader
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare import duplicates, preparation, progress_file, scan, split, writing
from openpalm.data.prepare.parts import build
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError


class Killed(BaseException):
    """What no handler of ours expects."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(document_reader, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(progress_file, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr("openpalm.data.text.byte_level.PIECE_CHARACTERS", 300)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def inputs(tmp_path):
    """Rows with blank and repeated ones, a folder of texts, and one long text."""
    rows = [f"document {i}: " + "größer 日本 word\nline " * (i % 13) for i in range(250)]
    rows[7:9] = [" ", rows[3]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "f").mkdir()
    for i in range(3):
        (tmp_path / "f" / f"{i}.txt").write_text(f"text {i // 2} of\nsome length\n" * 40)
    (tmp_path / "long.txt").write_text("One long text of many words\nin lines, é.\n" * 400)
    return [str(tmp_path / "f"), str(path), str(tmp_path / "long.txt")]


def run(inputs, out, **options):
    options = {"tokenizer": "byte", "val": "tail:0.4", "shard_tokens": 7001, **options}
    return prepare(PrepareRequest(inputs=inputs, out=out, **options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CASES = [
    {"tokenizer": "byte"},
    {"tokenizer": "bpe:400", "val": "hash", "dedup": "none"},
]


def as_they_come(self, work, tasks):
    """The mistake of taking results when they are ready."""
    return (done.result() for done in as_completed([self._pool.submit(work, t) for t in tasks]))


def slow_at_first(self, segment, encode=preparation.Encoder.__call__):
    if segment.number % 3 == 0:
        time.sleep(0.02)
    return encode(self, segment)


MISTAKES = {
    "results as they come": (workers.Workers, "map", as_they_come),
    "a hash starts over": (
        writing,
        "_reopened",
        lambda folder, entry: writing._HashedFile(folder / entry.name, entry.size),
    ),
    "all written twice": (
        preparation.Segments,
        "read",
        lambda self, share, begin=(0, 0), read=preparation.Segments.read: read(self, share),
    ),
    "scanned blocks scanned again": (scan, "islice", lambda blocks, begin, end: blocks),
}


def check_bytes(inputs, folder, killed):
    """Resumed after a kill, and by other numbers of threads: the bytes of the first run."""
    run(inputs, killed, workers=3)
    run(inputs, folder / "again", workers=3)
    for out in (killed, folder / "again"):
        assert contents(out) == contents(folder / "right")


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_check_sees_mistakes(mistake, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.Encoder, "__call__", slow_at_first)
    after = 60 if mistake == "scanned blocks scanned again" else 180
    assert until_killed(inputs, tmp_path / "killed", after, monkeypatch)
    run(inputs, tmp_path / "right")
    if mistake is None:
        check_bytes(inputs, tmp_path, tmp_path / "killed")
        return
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises((AssertionError, DataError)):
        check_bytes(inputs, tmp_path, tmp_path / "killed")


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_workers_changes_no_byte(workers, options, inputs, tmp_path):
    run(inputs, tmp_path / "one", workers=1, **options)
    run(inputs, tmp_path / "many", workers=workers, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_where_blocks_and_segments_end_changes_no_token(inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "one")
    for size in (500, 1 << 20):
        monkeypatch.setattr(document_reader, "BLOCK_BYTES", size)
        run(inputs, tmp_path / f"{size}")
        assert contents(tmp_path / "one") == contents(tmp_path / f"{size}")


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("jobs", [1, 2, 5, 23])
def test_parts_joined_are_what_one_job_writes(jobs, options, inputs, tmp_path):
    whole = run(inputs, tmp_path / "whole", **options)
    parts = [tmp_path / f"part-{i}" for i in range(1, jobs + 1)]
    for i, part in enumerate(parts, start=1):
        run(inputs, part, shard=f"{i}/{jobs}", **options)
        with pytest.raises(DataError, match="run `openpalm data build` on all parts"):
            open_dataset(part)
    assert build(parts[::-1], tmp_path / "joined") == whole
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    tokens = [
        sum(split["tokens"] for split in json.loads(part)["manifest"]["splits"].values())
        for part in ((folder / "part.json").read_bytes() for folder in parts)
    ]
    total = sum(split.tokens for split in whole.splits.values())
    assert sum(tokens) == total
    if jobs < 9:
        assert max(tokens) < total / jobs + 4000


def test_a_finished_part_is_not_prepared_again(inputs, tmp_path):
    run(inputs, tmp_path / "p", shard="1/2")
    assert run(inputs, tmp_path / "p", shard="1/2").unchanged
    with pytest.raises(DataError, match="holds part 1/2; choose another"):
        run(inputs, tmp_path / "p", shard="2/2")
    with pytest.raises(DataError, match="which is not ours"):
        run(inputs, tmp_path / "p")


def test_parts_that_do_not_belong_together(inputs, tmp_path):
    for name, shard, options in (
        ("1", "1/2", {}),
        ("2", "2/2", {}),
        ("again", "1/2", {}),
        ("third", "3/3", {}),
        ("other", "2/2", {"val": "hash"}),
    ):
        run(inputs, tmp_path / name, shard=shard, **options)
    for names, says in (
        (["1"], "parts missing: 2/2"),
        (["1", "again"], "is part 1/2, and so is"),
        (["1", "other"], "was made from other inputs or with other settings than"),
        (["1", "2", "third"], "was made from other inputs"),
    ):
        with pytest.raises(DataError, match=says):
            build([tmp_path / name for name in names], tmp_path / "out")
    torn = next((tmp_path / "2").glob("val-*.bin"))
    torn.write_bytes(torn.read_bytes()[::-1])
    with pytest.raises(DataError, match="was altered"):
        build([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def until_killed(inputs, out, after, monkeypatch, **options):
    """Prepares up to the call of fsync number `after`; whether it came that far."""
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


@pytest.mark.parametrize("options", [*CASES, {"shard": "2/3"}])
def test_killed_at_every_durable_moment(options, inputs, tmp_path, monkeypatch):
    run(inputs, tmp_path / "at-once", **options)
    whole = contents(tmp_path / "at-once")
    kills = 0
    for after in range(1, 1000, 7):
        out = tmp_path / "killed"
        if not until_killed(inputs, out, after, monkeypatch, **options):
            break
        kills += 1
        run(inputs, out, **options)
        assert contents(out) == whole
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert kills > 15


def test_killed_again_and_again_it_still_arrives(inputs, tmp_path, monkeypatch):
    """Every start gets a little further, so it goes on and does not start over."""
    run(inputs, tmp_path / "at-once")
    starts = 0
    while until_killed(inputs, tmp_path / "out", 25, monkeypatch):
        starts += 1
        assert starts < 100
    assert starts > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


def test_what_is_written_is_not_encoded_again(inputs, tmp_path, monkeypatch):
    encoded = []
    encode = preparation.Encoder.__call__

    def counting(self, segment):
        encoded.append((segment.source, segment.number))
        return encode(self, segment)

    monkeypatch.setattr(preparation.Encoder, "__call__", counting)
    assert until_killed(inputs, tmp_path / "out", 180, monkeypatch)
    before = set(encoded)
    encoded.clear()
    run(inputs, tmp_path / "out")
    waiting = 2 * 9 + 2  # segments in flight when it was killed
    assert len(before) > 8
    assert len(before & set(encoded)) <= waiting
    assert encoded[0] > min(before)


SIGKILLED = """
import itertools, os, signal, sys
from pathlib import Path
from openpalm.data.corpus import document_reader
from openpalm.data.prepare import progress_file
from openpalm.data.prepare.preparation import PrepareRequest, prepare
document_reader.BLOCK_BYTES, progress_file.CHECKPOINT_S = 2000, 0.0
calls, fsync = itertools.count(1), os.fsync
def killing(handle):
    if next(calls) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
os.fsync = killing
prepare(PrepareRequest(inputs=sys.argv[3:], out=Path(sys.argv[2]), tokenizer="byte",
                       val="tail:0.4", shard_tokens=7001))
"""


def test_really_killed_several_times(inputs, tmp_path):
    for after in (4, 130, 40):
        words = [sys.executable, "-c", SIGKILLED, str(after), tmp_path / "out", *inputs]
        assert subprocess.run(words).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match=r"no prepared dataset here \(no manifest.json\)"):
        open_dataset(tmp_path / "out")
    run(inputs, tmp_path / "out")
    run(inputs, tmp_path / "at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


@pytest.mark.parametrize(
    ("options", "differing"),
    [({"tokenizer": "bpe:300"}, "tokenizer"), ({"val": "hash", "dedup": "none"}, "val, dedup")],
)
def test_unfinished_work_of_other_settings_is_kept(
    options, differing, inputs, tmp_path, monkeypatch
):
    assert until_killed(inputs, tmp_path / "out", 30, monkeypatch)
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=rf"an unfinished dataset \(other {differing}\)"):
        run(inputs, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_unfinished_work_on_changed_inputs_is_refused(inputs, tmp_path, monkeypatch):
    assert until_killed(inputs, tmp_path / "out", 180, monkeypatch)
    path = tmp_path / "f" / "0.txt"
    text = path.read_text()
    path.write_text(text.replace("text 0", "text 7"))
    with pytest.raises(DataError, match=r"0\.txt: changed since this dataset was begun"):
        run(inputs, tmp_path / "out")
    path.write_text(text)
    run(inputs, tmp_path / "out")
    run(inputs, tmp_path / "at-once")
    assert contents(tmp_path / "out") == contents(tmp_path / "at-once")


@pytest.mark.parametrize("damage", ["progress file", "measures", "last shard", "shorter shard"])
def test_damaged_unfinished_work_is_refused(damage, inputs, tmp_path, monkeypatch):
    assert until_killed(inputs, tmp_path / "out", 180, monkeypatch)
    name = {"progress file": progress_file.PARTIAL, "measures": "documents.partial"}.get(
        damage, "train-00000.bin"
    )
    if damage == "last shard":
        name = max(path.name for path in (tmp_path / "out").glob("train-*.bin"))
    file = tmp_path / "out" / name
    data = file.read_bytes()
    changed = {"progress file": b"[]\n" + data, "last shard": bytes(len(data))}
    file.write_bytes(changed.get(damage, data[: len(data) // 3]))
    with pytest.raises(DataError, match=r"is no progress file|torn|altered|the manifest says"):
        run(inputs, tmp_path / "out")


def test_duplicates_are_found_across_buckets_and_slices(tmp_path, monkeypatch):
    texts = [f"text {i % 331}" for i in range(1000)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run([str(path)], tmp_path / "one", val="hash")
    monkeypatch.setattr(duplicates, "BUCKET_DOCUMENTS", 50)
    monkeypatch.setattr(split, "SLICE", 64)
    manifest = run([str(path)], tmp_path / "two", val="hash")
    assert manifest.documents.duplicates == 1000 - 331
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_vocabulary_for_much_text_is_learnt_from_a_sample(inputs, tmp_path, monkeypatch):
    whole = run(inputs, tmp_path / "whole", tokenizer="bpe:400")
    monkeypatch.setattr(preparation, "BPE_BYTES", 5000)
    sampled = run(inputs, tmp_path / "sampled", tokenizer="bpe:400")
    assert sampled.tokenizer != whole.tokenizer
    assert run(inputs, tmp_path / "again", tokenizer="bpe:400", workers=1) == sampled


FIRST = [
    ({"tokenizer": "byte"}, "3372c373ed492a21a01c950dadb3777cbeef07750548cfecbc6d271004ab9ef2"),
    (
        {"tokenizer": "byte", "val": "hash", "shard_tokens": 1000},
        "7fabda45cfba1ceebef9d18a60bc5ab7182287c07f8434a78a856d05597da5a9",
    ),
]


@pytest.mark.parametrize(("options", "digest"), FIRST)
def test_the_bytes_stay_what_the_first_version_wrote(options, digest, tmp_path, monkeypatch):
    """The hash of the hashes of what version 0.1.0, which knew no segments, made of these."""
    rows = [{"text": f"row {i} " + "größer 日本\n" * (i % 9)} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("A text, é and\nall.\n" * 500)
    monkeypatch.chdir(tmp_path)
    manifest = run(["a.jsonl", "b.txt"], tmp_path / "out", **options)
    hashes = "".join(file.sha256 for split in manifest.splits.values() for file in split.files)
    assert hashlib.sha256(hashes.encode()).hexdigest() == digest
