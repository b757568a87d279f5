import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openpalm.base import progress_bar
from openpalm.cli.main import main


def run(capsys, *words):
    """(exit status, standard output, standard error) of `openpalm data WORDS`."""
    status = main(["data", *map(str, words)])
    return status, *capsys.readouterr()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("A line of text, and one more.\n" * 50)
    return path


def test_prepare_says_what_it_made_and_what_comes_next(text, tmp_path, capsys):
    out = tmp_path / "out"
    status, said, errors = run(capsys, "prepare", text, "--out", out, "--tokenizer", "byte")
    assert (status, errors) == (0, "")
    assert "read 1 document: 0 repeated and 0 blank dropped" in said
    assert "1,425 bytes" in said
    assert f"openpalm train --model palm-tiny --data {out}" in said
    status, said, _ = run(capsys, "prepare", text, "--out", out, "--tokenizer", "byte")
    assert status == 0
    assert said.startswith(f"{out}: already holds this dataset, nothing changed\n")


def test_every_option_reaches_the_manifest(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i % 9}"}) + "\n" for i in range(20)))
    words = ["--out", tmp_path / "out", "--tokenizer=byte", "--text-field=body", "--json"]
    words += ["--val-fraction", "0.3", "--val", "tail:0.2", "--dedup", "none"]
    status, said, _ = run(capsys, "prepare", path, *words)
    assert status == 0
    manifest = json.loads(said)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    wanted = {"text_field": "body", "val_fraction": 0.3, "val": "tail:0.2", "dedup": "none"}
    assert wanted.items() < manifest["settings"].items()
    assert manifest["documents"] == {"read": 20, "duplicates": 0, "blank": 0}


def test_several_inputs(text, tmp_path, capsys):
    other = tmp_path / "b.txt"
    other.write_text("Other text.\n" * 9)
    words = [text, other, "--out", tmp_path / "out", "--tokenizer", "byte"]
    status, said, _ = run(capsys, "prepare", *words)
    assert status == 0
    assert "read 2 documents" in said


def test_inspect(text, tmp_path, capsys):
    out = tmp_path / "out"
    run(capsys, "prepare", text, "--out", out, "--tokenizer", "byte")
    status, said, _ = run(capsys, "inspect", out, "--samples", "1")
    assert status == 0
    assert f"{out}: vocabulary 265, uint16, validation split by tail; 4 files intact" in said
    assert '"A line of text, and one more.\\nA line' in said
    status, said, _ = run(capsys, "inspect", out, "--json")
    found = json.loads(said)
    assert found["splits"]["train"]["bytes"] + found["splits"]["val"]["bytes"] == 1500
    assert found["files_checked"] == 4

    torn = out / "train-00000.bin"
    torn.write_bytes(torn.read_bytes()[::-1])
    status, said, errors = run(capsys, "inspect", out)
    assert (status, said) == (2, "")
    assert "train-00000.bin: was altered" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prepare"], "missing"),
        (["prepare", "a.txt"], "missing"),
        (["prepare", "no.txt", "--out", "o"], "no.txt: no such file or folder; check the path"),
        (["prepare", "a.txt", "--out", "o", "--vall", "x"], "unknown option --vall"),
        (["prepare", "a.txt", "--out", "o", "--dedup", "fuzzy"], "one of exact, none"),
        (["prepare", "a.txt", "--out", "o", "--val-fraction", "lots"], "--val-fraction lots"),
        (["prepare", "a.txt", "--out", "o", "--val-fraction", "2"], "must be between 0 and 1"),
        (["prepare", "a.txt", "--out", "o", "--tokenizer", "bpe:x"], "VOCAB must be a whole"),
        (["prepare", "a.txt", "--out", "o", "--tokenizer", "gpt9"], "gpt9: no such tokenizer"),
        (["prepare", "a.txt", "--out", "o", "--workers", "0"], "--workers 0: must be at least 1"),
        (["prepare", "a.txt", "--out", "o", "--shard", "0/4"], "--shard 0/4: must be I/N with I"),
        (["prepare", "a.txt", "--out", "o", "--shard", "5/4"], "--shard 5/4: must be I/N with I"),
        (["build", "nowhere", "--out", "o"], "nowhere: no prepared dataset here (no part.json)"),
        (["blocks", "--out", "o"], "missing INPUTS, or --dataset-name"),
        (["blocks", "a.txt", "--out", "o", "--hf_account", "me"], "--hf-account 'me': must be AC"),
        (["push", "nowhere", "--repo", "me/set"], "nowhere: no prepared dataset here"),
        (["prepare", "a.txt", "--out", "s3://b/o"], "--out s3://b/o: must be a local path"),
        (["inspect", "nowhere"], "nowhere: no prepared dataset here"),
        (["inspcet", "x"], "data inspcet: must be prepare, build, blocks, inspect, push"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_2(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text " * 99)
    status, said, errors = run(capsys, *words)
    assert (status, said) == (2, "")
    assert says in errors
    assert errors.startswith("openpalm: error: ")
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_jobs_and_build(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)))
    words = ["prepare", path, "--tokenizer", "byte", "--workers", "2", "--out"]
    for i in (1, 2):
        part = ["--shard", f"{i}/2"]
        status, said, _ = run(capsys, *words, tmp_path / f"part-{i}", *part)
        assert status == 0
        assert f"part {i}/2; next: openpalm data build" in said
    status, _, errors = run(capsys, "inspect", tmp_path / "part-1")
    assert status == 2
    assert "run `openpalm data build` on all parts" in errors
    parts = [tmp_path / "part-2", tmp_path / "part-1"]
    status, said, _ = run(capsys, "build", *parts, "--out", tmp_path / "out", "--json")
    run(capsys, *words, tmp_path / "alone")
    assert said == (tmp_path / "alone" / "manifest.json").read_text()
    assert run(capsys, "inspect", tmp_path / "out")[0] == 0
    status, said, _ = run(capsys, "build", *parts, "--out", tmp_path / "out")
    assert "already holds this dataset" in said


def test_a_full_disk_is_exit_1(text, tmp_path, capsys, monkeypatch):
    from openpalm.data.prepare import writing

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing._HashedFile, "write", full)
    status, _, errors = run(capsys, "prepare", text, "--out", tmp_path / "out")
    assert status == 1
    assert "No space left on device); free some space" in errors


def test_long_work_shows_a_bar_on_standard_error(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "LONG_JOB_S", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    words = [text, "--out", tmp_path / "out", "--tokenizer", "byte", "--json"]
    status, said, errors = run(capsys, "prepare", *words)
    assert status == 0
    assert "preparing" in errors
    json.loads(said)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_verb_alone_lists_both(words, capsys):
    status, said, _ = run(capsys, *words)
    assert status == 0
    assert "prepare     make token shards from text, .jsonl" in said
    assert "inspect     show the contents of a prepared" in said


def test_what_a_folder_holds_beside_its_texts_is_counted(tmp_path, capsys):
    (tmp_path / "in" / ".git").mkdir(parents=True)
    for name in ("a.txt", ".git/x.txt", "._a.txt", "b.py"):
        (tmp_path / "in" / name).write_text("some words of text")
    words = ["prepare", tmp_path / "in", "--out", tmp_path / "out", "--tokenizer", "byte"]
    for _ in range(2):
        assert "not read in folders: 2 hidden, 1 of another kind" in run(capsys, *words)[1]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
)
def test_what_the_terminal_cannot_show_is_escaped(environment, tmp_path):
    """A text cut inside a character, and characters beyond the encoding."""
    (tmp_path / "a.txt").write_text("\u00fcbung \u2014 \u65e5\u672c " * 9, encoding="utf-8")
    words = [sys.executable, "-m", "openpalm", "data"]
    options = {"capture_output": True, "env": os.environ | environment}
    prepare = [*words, "prepare", tmp_path / "a.txt", "--out", tmp_path / "out"]
    assert subprocess.run([*prepare, "--tokenizer", "byte"], **options).returncode == 0
    done = subprocess.run([*words, "inspect", tmp_path / "out"], **options)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u65e5" in done.stdout


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    """The last line has all bytes of both passes; no line comes before its time."""
    path, size = tmp_path / "a.txt", 3_000_000
    path.write_text("A line of text, 31 bytes long.\n" * (size // 31), encoding="utf-8")
    for between, counts in ((0.0, True), (1e9, False)):
        monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", between)
        words = ["--out", tmp_path / f"out-{counts}", "--tokenizer", "byte"]
        status, _, errors = run(capsys, "prepare", path, *words)
        assert status == 0
        lines = errors.splitlines()
        assert bool(lines) == counts
        if counts:
            assert all(re.fullmatch(r"\w+: [0-6] of 6 MB", line) for line in lines)
            assert lines[-1].endswith(": 6 of 6 MB")


def test_the_options_of_cleaning_and_packing(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(f" number {i} @,@ 000 . " for i in range(400)) + "z" * 900)
    words = ["--out", tmp_path / "out", "--tokenizer=byte", "--split-text", "<|endoftext|>"]
    words += ["--detokenize", "wikitext", "--repack-epochs", "2", "--seed", "3"]
    words += ["--min-unique-tokens", "3", "--sequence-tokens", "100"]
    status, said, errors = run(capsys, "prepare", path, *words)
    assert (status, errors) == (0, "")
    assert "read 400 documents" in said
    assert "train holds its documents 2 times, in new orders" in said
    dropped = re.findall(
        r"(train|val) +(\d+) sequences of 100 tokens dropped: fewer than 3 d", said
    )
    assert sum(int(count) for _, count in dropped) in (8, 16)
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    wanted = {"split_text": "<|endoftext|>", "detokenize": "wikitext", "repack_epochs": 2}
    wanted |= {"seed": 3, "min_unique_tokens": 3, "sequence_tokens": 100}
    assert wanted.items() <= settings.items()
    status, said, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    assert status == 0
    assert '"number 0,000.' in said or '"number 1,000.' in said
    status, said, _ = run(capsys, "prepare", path, *words, "--keep-order")
    assert status == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fix-text", "all"], "--fix-text all: must be one of none, ftfy"),
        (["--detokenize", "ptb"], "--detokenize ptb: must be one of none, wikitext"),
        (["--split-text", ""], "--split-text: is empty"),
        (["--min-unique-tokens", "2049"], "must be 0 to --sequence-tokens (2048)"),
        (["--repack-epochs", "0"], "--repack-epochs 0: must be 1 to 1000"),
    ],
)
def test_wrong_options_of_cleaning_and_packing(words, says, text, tmp_path, capsys):
    status, _, errors = run(capsys, "prepare", text, "--out", tmp_path / "out", *words)
    assert status == 2
    assert says in errors
    assert errors.count("\n") == 1
