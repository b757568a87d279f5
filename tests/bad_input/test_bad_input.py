"""Whatever is wrong with what is given: one line that says so, exit 2, nothing lost or executed.

Text, requests and pickles run the program in a process of their own, as a user does; `quickly` asks
the same of further cases in this process, where torch is loaded already.
"""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from command_line import program, talk

import openpalm

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def contents(folder):
    """Every file below, so that what must not change can be compared."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*words, status=2):
    """The one error line of a command that must fail without a word besides."""
    done = program(*words)
    assert "Traceback" not in done.stderr, done.stderr
    return one_line(done.returncode, done.stdout, done.stderr.splitlines(), status)


@pytest.fixture
def quickly(said):
    return lambda *words: one_line(*said(*words))


def one_line(found, output, errors, status=2):
    assert (found, output, len(errors)) == (status, "", 1), errors
    assert errors[0].startswith("openpalm: error: ")
    return errors[0].removeprefix("openpalm: error: ")


@pytest.fixture
def place(work, tmp_path, monkeypatch):
    """An empty folder to fail in; the shared run must be as it was."""
    before = contents(work)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert contents(work) == before


# --- text


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.txt", None, ["missing.txt: no such file", "check the path"]),
        ("no/*.txt", None, ["no/*.txt: matches no file", "check the pattern"]),
        ("empty.txt", b"", ["empty.txt: is empty", "give a file"]),
        ("blank.txt", b" \n\n\t\n", ["blank.txt: no text", "give other inputs"]),
        ("binary.txt", bytes(range(256)) * 9, ["binary.txt: NUL byte at offset 0", "leave it out"]),
        ("latin.txt", "abc é def".encode("latin-1"), ["latin.txt: not valid UTF-8", "offset 4"]),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            ["rows.jsonl:2: no field 'text'", "--text-field"],
        ),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', ["torn.jsonl:2: not JSON", "one object"]),
        ("list.jsonl", b"[1, 2]\n", ["list.jsonl:1: "]),
        ("number.jsonl", b'{"text": 3}\n', ["number.jsonl:1: "]),
        ("packed.jsonl.gz", b"no gzip at all", ["packed.jsonl.gz: "]),
    ],
)
def test_text_that_cannot_be_read(place, quickly, name, content, parts):
    if content is not None:
        (place / name).write_bytes(content)
    line = quickly("data", "prepare", name, "--out", "out", "--tokenizer", "byte")
    assert all(part in line for part in parts), line
    assert not (place / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("tokenizer", "part"),
    [
        ("bpe:x", "VOCAB must be a whole number; try bpe:4096"),
        ("bpe:3", "VOCAB must be"),
        ("nowhere.json", "nowhere.json: no such tokenizer; use byte"),
        ("text.txt", "text.txt: is not JSON"),
    ],
)
def test_tokenizers_that_are_none(place, quickly, tokenizer, part):
    (place / "text.txt").write_text("some text " * 50)
    line = quickly("data", "prepare", "text.txt", "--out", "out", "--tokenizer", tokenizer)
    assert part in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "--modle", "palm-tiny"], ["--modle", "did you mean --model?"]),
        (["train", "--steps", "ten"], ["--steps ten", "must be a whole number", "--help"]),
        (["train", "--config", "no.yaml"], ["--config no.yaml", "no such file", "check the path"]),
        (["sample", "--topk=3"], ["--topk", "did you mean --top-k?"]),
        (["samples", "x"], ["samples", "did you mean sample?"]),
        (["eval"], ["PATH", "--help"]),
        (["eval", "base"], ["one of --data, --text and --tasks"]),
        (["convert", "a", "b", "--from", "llama"], ["--from llama", "palm-rlhf-pytorch"]),
    ],
)
def test_requests_that_cannot_be_understood(place, words, parts):
    line = refusal(*words)
    assert all(part in line for part in parts), line
    assert list(place.iterdir()) == []


def test_a_settings_file_that_would_execute(place):
    Path("evil.yaml").write_text("seed: !!python/object/apply:os.system ['touch executed']\n")
    line = refusal("train", "--config", "evil.yaml")
    assert "--config evil.yaml: is not valid YAML" in line
    assert not Path("executed").exists()


# --- pickles


class Bomb:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return (Path.write_text, (Path("executed").resolve(), "boom"))


def plain_bomb(path):
    path.write_bytes(pickle.dumps({"layers.0.fn.attn_out.weight": Bomb()}))


def zipped_bomb(path):
    torch.save({"layers.0.fn.attn_out.weight": Bomb()}, path)


@pytest.fixture(params=[plain_bomb, zipped_bomb])
def bomb(request, place):
    path = place / "bomb.pt"
    request.param(path)
    return path


def test_the_bomb_is_real(bomb):
    """Read carelessly it goes off, so the tests below would notice."""
    if bomb.read_bytes().startswith(b"PK"):
        torch.load(bomb, weights_only=False)
    else:
        pickle.loads(bomb.read_bytes())
    assert Path("executed").exists()


def test_convert_does_not_set_a_bomb_off(bomb, quickly):
    line = quickly("convert", bomb, "out")
    assert str(bomb) in line
    assert "executed" in line
    assert not Path("executed").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "bomb.pt", "x"],
        ["train", "--init", "bomb.pt", "--data", "data", "--out", "out", "--steps", 1],
        ["sft", "--init", "bomb.pt", "--data", "q.jsonl", "--out", "out", "--steps", 1],
    ],
)
def test_no_other_verb_opens_a_foreign_file(place, work, quickly, words):
    zipped_bomb(place / "bomb.pt")
    (place / "data").symlink_to(work / "data")
    talk(place / "q.jsonl", [("assistant", "a")])
    line = quickly(*words)
    assert "bomb.pt: not a checkpoint of OpenPaLM" in line
    assert "`openpalm convert`" in line
    assert not Path("executed").exists()
    assert not Path("out").exists()


# --- checkpoints


@pytest.fixture
def base(place, work):
    return Path(shutil.copytree(work / "base", place / "base"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["torn", "altered", "emptied", "removed"])
def test_a_damaged_checkpoint_is_never_loaded(base, name, how, quickly):
    file = base / name
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] = (content[middle] + 1) % 128
    changed = {"torn": content[: middle // 2], "altered": content, "emptied": b""}
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes(changed[how])
    line = quickly("sample", base, "x")
    assert str(base) in line
    assert "manifest.json" in line or name in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["sample", "nowhere", "x"], ["nowhere: no such checkpoint or run", "check the path"]),
        (["sample", "folder", "x"], ["folder: not a checkpoint", "openpalm convert"]),
        (["eval", "base", "--data", "nowhere"], ["nowhere: no prepared dataset", "data prepare"]),
    ],
)
def test_places_without_what_is_asked_for(base, quickly, words, parts):
    Path("folder").mkdir()
    line = quickly(*words)
    assert all(part in line for part in parts), line


def test_a_checkpoint_of_another_model(base, work, quickly):
    words = ["--model", "palm-tiny", "--data", work / "data", "--out", "out", "--steps", 1]
    line = quickly("train", "--init", base, *words)
    for part in ("base: a checkpoint of another model than palm-tiny", "dim 32, not 128"):
        assert part in line
    assert "leave --model out" in line
    assert not Path("out").exists()


def test_a_config_of_another_model_beside_the_weights(base, quickly):
    config = json.loads((base / "config.json").read_text())
    config["model"]["dim"] = 16
    (base / "config.json").write_text(json.dumps(config))
    assert "config.json" in quickly("sample", base, "x")


# --- data


def test_data_that_is_torn(place, work, quickly):
    data = Path(shutil.copytree(work / "data", place / "data"))
    (shard,) = data.glob("train-*.bin")
    shard.write_bytes(shard.read_bytes()[:-1])
    words = ["--model", "palm-tiny", "--out", "out", "--steps", 1]
    line = quickly("train", "--data", data, *words)
    assert f"{shard}: " in line
    assert "prepare" in line
    assert not Path("out").exists()


def test_data_that_is_altered_is_noticed(place, work, quickly):
    data = Path(shutil.copytree(work / "data", place / "data"))
    (shard,) = data.glob("train-*.bin")
    shard.write_bytes(bytes(shard.stat().st_size))
    words = ["--model", "palm-tiny", "--out", "out", "--steps", 1]
    for command in (["data", "inspect", data], ["train", "--data", data, *words]):
        assert f"{shard}: was altered" in quickly(*command)
    assert not Path("out").exists()


@pytest.mark.parametrize("data", ["nowhere", "base", "base/config.json"])
def test_data_that_is_none(base, quickly, data):
    words = ["--model", "palm-tiny", "--out", "out", "--steps", 1]
    line = quickly("train", "--data", data, *words)
    assert data in line
    assert "prepare" in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["talk.jsonl: no such file", "check the path"]),
        (b"", ["talk.jsonl: is empty", "give a file"]),
        (b"\xff\xfe\x00\x01", ["talk.jsonl:1: "]),
        (b'{"text": "a"}\n', ["talk.jsonl:1: this row is a text", "data prepare"]),
        (b'{"messages": [{"role": "robot", "content": "x"}]}\n', ["talk.jsonl:1", "robot"]),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}\n',
            ["no conversation can be used", "no assistant"],
        ),
    ],
)
def test_conversations_that_cannot_be_learnt_from(base, quickly, content, parts):
    if content is not None:
        Path("talk.jsonl").write_bytes(content)
    words = ["--data", "talk.jsonl", "--out", "out", "--steps", 1]
    line = quickly("sft", "--init", base, *words)
    assert all(part in line for part in parts), line
    assert not Path("out").exists()


# --- where it goes


def test_out_is_a_file(base, work, quickly):
    Path("out").write_text("mine")
    words = ["--data", work / "data", "--steps", 1]
    line = quickly("train", "--init", base, *words, "--out", "out")
    assert "--out out: is, or is under, a file; choose a directory" in line
    line = quickly("data", "prepare", work / "text.txt", "--tokenizer", "byte", "--out", "out")
    assert "--out out: out is a file; name a folder" in line
    assert Path("out").read_text() == "mine"


def test_out_holds_something_else(base, work, quickly):
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("mine")
    words = ["--data", work / "data", "--steps", 1]
    line = quickly("train", "--init", base, *words, "--out", "out")
    assert "--out out: holds thesis.txt but no run; choose a new directory" in line
    line = quickly("convert", base, "out", "--to", "palm-rlhf-pytorch")
    assert line.startswith("out: ")
    assert contents(Path("out")) == {Path("out/thesis.txt"): b"mine"}


def test_a_run_made_with_other_settings(work, place, quickly):
    run = Path(shutil.copytree(work / "run", place / "run"))
    before = contents(run)
    words = ["--init", work / "base", "--data", work / "data", "--out", run, "--steps", 8]
    words += ["--batch-tokens", 96, "--dtype", "float32", "--eval-every", 4]
    line = quickly("train", *words)
    assert f"--out {run}: that run was made with another --batch-tokens (192, now 96)" in line
    assert "choose another --out" in line
    assert contents(run) == before


@pytest.mark.skipif(AS_ROOT, reason="nothing is read-only for root")
def test_out_is_read_only(base, work):
    Path("locked").mkdir(mode=0o555)
    words = ["--data", work / "data", "--steps", 1]
    line = refusal("train", "--init", base, *words, "--out", "locked/run", status=1)
    assert "locked/run" in line
    assert "Permission denied" in line


# --- a full disk


@pytest.fixture
def small_disk(place):
    """A file system with room for one checkpoint but not for two; needs root."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk]
    if not (AS_ROOT and shutil.which("mount")) or subprocess.run(mount, stderr=-3).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing(small_disk, base, work, said):
    run = small_disk / "run"
    words = ["train", "--init", base, "--data", work / "data", "--out", run, "--steps", 6]
    words += [
        "--batch-tokens",
        96,
        "--dtype",
        "float32",
        "--eval-every",
        6,
        "--keep-checkpoints",
        0,
    ]
    words += ["--save-every", 1]
    status, _, errors = said(*words)
    assert status == 1
    assert "Traceback" not in "".join(errors)
    (line,) = [x for x in errors if x.startswith("openpalm: error: ")]
    assert errors[-1] == line
    assert f"{run}/checkpoints/step-" in line
    assert "No space left on device" in line

    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved
    assert saved == [f"step-{i + 1:08d}" for i in range(len(saved))]
    assert len(saved) < 6
    assert openpalm.load(run).config == openpalm.load(base).config

    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    status, _, errors = said(*words)
    assert status == 0, errors
    assert f"resuming after step {len(saved)}" in "\n".join(errors)
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
