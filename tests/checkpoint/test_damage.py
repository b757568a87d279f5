"""Damaged files: whatever changed on disk is refused by the name of the file."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FILES, TOKENIZER, refused, rewrite_manifest

import openpalm
from openpalm.base import files
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import verify
from openpalm.errors import CheckpointError, StorageError


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(copied: Path, file: str):
    (copied / file).unlink()
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_truncated_file_is_named(copied: Path, file: str, kept: float):
    content = (copied / file).read_bytes()
    size = min(int(len(content) * kept), len(content) - 1)  # 1.0: all but the last byte
    (copied / file).write_bytes(content[:size])
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_named(copied: Path, file: str, at: float):
    content = bytearray((copied / file).read_bytes())
    content[min(int(len(content) * at), len(content) - 1)] ^= 1
    (copied / file).write_bytes(content)
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
def test_a_longer_file_is_named(copied: Path, file: str):
    with (copied / file).open("ab") as stream:
        stream.write(b" ")
    refused(copied, file)


@pytest.mark.parametrize("file", FILES)
def test_a_directory_in_a_file_s_place_is_named(copied: Path, file: str):
    (copied / file).unlink()
    (copied / file).mkdir()
    refused(copied, file)


def test_damage_anywhere_is_refused(copied: Path):
    """Truncations and changed bytes at seeded places of every file, white space too."""
    drawn = random.Random(0)
    for _ in range(60):
        name = drawn.choice(FILES)
        file = copied / name
        content = file.read_bytes()
        at = drawn.randrange(len(content))
        other = bytes([content[at] ^ drawn.randrange(1, 256)])
        changed = [content[:at], content[:at] + other + content[at + 1 :]][drawn.randrange(2)]
        file.write_bytes(changed)
        refused(copied, name)
        file.write_bytes(content)
    openpalm.load(copied)


@pytest.mark.parametrize("change", [("\n", "\r\n"), ("\n", "\r"), ("  ", "\t"), ("\n", "\n\n")])
def test_white_space_of_the_manifest_counts_too(copied: Path, change: tuple[str, str]):
    file = copied / "manifest.json"
    file.write_bytes(file.read_bytes().replace(change[0].encode(), change[1].encode(), 1))
    refused(copied, "manifest.json")


def test_a_half_deleted_train_is_damage(copied: Path):
    (copied / "train" / "state.safetensors").unlink()
    refused(copied, "train/state.safetensors")
    shutil.rmtree(copied / "train")
    (copied / "train").mkdir()
    refused(copied, "train/")


UNREADABLE = (errno.EIO, errno.EACCES, errno.EMFILE)


@pytest.mark.parametrize("number", UNREADABLE)
def test_a_file_that_the_system_fails_to_read_is_no_damage(
    a_run: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """No older checkpoint takes its place: the work stops, and says which file."""
    newest = checkpoint.steps(a_run)[-1]

    def broken(path: Path, *more: Any, **named: Any) -> Any:
        if path == newest / file:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *more, **named)

    opened = Path.open
    monkeypatch.setattr(Path, "open", broken)
    for file in ("model.safetensors", "config.json", "manifest.json"):
        with pytest.raises(StorageError) as caught:
            openpalm.load(a_run)
        assert str(newest / file) in str(caught.value)
        assert os.strerror(number) in str(caught.value)
    file = "train/state.safetensors"
    assert checkpoint.latest(a_run) == newest
    with pytest.raises(StorageError, match=rf"train/state.safetensors.*{os.strerror(number)}"):
        checkpoint.latest(a_run, training=True)
    with pytest.raises(StorageError, match=r"train/state\.safetensors"):
        checkpoint.load_train_state(newest)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    a_run: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", broken)
    with pytest.raises(StorageError, match=r"checkpoints: cannot be read \(Permission denied\)"):
        checkpoint.latest(a_run)
    monkeypatch.undo()
    assert checkpoint.steps(a_run / "nowhere") == []


def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose content is hashed from now on, in the order of hashing."""
    names: list[str] = []
    digest = files.hashlib.file_digest

    def counted(file: Any, algorithm: str) -> Any:
        names.append(Path(file.name).name)
        return digest(file, algorithm)

    monkeypatch.setattr(files.hashlib, "file_digest", counted)
    return names


MODEL = ["card.md", "config.json", "fingerprint.safetensors", "model.safetensors", "tokenizer.json"]


TRAIN = ["state.json", "state.safetensors"]


def test_only_what_is_read_is_hashed_and_once(copied: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    names = hashed_files(monkeypatch)
    openpalm.load(copied)
    checkpoint.load(checkpoint.resolve(copied))
    assert checkpoint.tokenizer_json(copied) == TOKENIZER
    assert sorted(names) == MODEL
    checkpoint.resolve(copied, training=True)
    checkpoint.load_train_state(copied)
    verify(copied)
    assert sorted(names) == sorted([*MODEL, *TRAIN])
    (copied / "card.md").touch()
    verify(copied)
    assert names[len(MODEL) + len(TRAIN) :] == ["card.md"]


def test_damage_in_train_counts_where_train_is_read(copied: Path):
    content = bytearray((copied / "train" / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (copied / "train" / "state.safetensors").write_bytes(content)
    openpalm.load(copied)
    for read in (verify, checkpoint.load_train_state):
        with pytest.raises(CheckpointError, match=r"train/state.safetensors was altered"):
            read(copied)
    with pytest.raises(CheckpointError, match="was altered"):
        checkpoint.resolve(copied, training=True)


LISTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "emptied": (lambda files: files.clear(), "does not list config.json"),
    "no weights": (lambda files: files.pop("model.safetensors"), "does not list model.safetensors"),
    "no config": (lambda files: files.pop("config.json"), "does not list config.json"),
    **{
        f"name {name[:12]!r}": (
            lambda files, name=name: files.update({name: {"bytes": 1, "sha256": "0" * 64}}),
            "its list of files",
        )
        for name in (
            "x" * 300,
            "/etc/passwd",
            "../up",
            "a/../b",
            "a//b",
            "./a",
            "",
            "a\0b",
            "\ud800",
        )
    },
    "name of 4,500": (
        lambda files: files.update({"a/" * 2250 + "b": {"bytes": 1, "sha256": "0" * 64}}),
        "File name too long",
    ),
    "no hash": (lambda files: files["card.md"].update(sha256=7), "its list of files"),
    "no size": (lambda files: files["card.md"].update(bytes="7"), "its list of files"),
    "no entry": (lambda files: files.update({"card.md": None}), "its list of files"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_files_that_was_not_written_here(copied: Path, kind: str):
    change, says = LISTS[kind]
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    change(files)
    rewrite_manifest(copied, files=files)
    assert says in refused(copied)


def test_a_file_that_the_manifest_does_not_list_is_not_used(copied: Path):
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    for name in ("tokenizer.json", "fingerprint.safetensors", "train/state.safetensors"):
        del files[name]
    (copied / "fingerprint.safetensors").write_bytes(b"none")
    rewrite_manifest(copied, files=files)
    openpalm.load(copied)
    assert checkpoint.tokenizer_json(copied) is None
    with pytest.raises(CheckpointError, match=r"lists no train/state.safetensors"):
        checkpoint.load_train_state(copied)
    del files["train/state.json"]
    rewrite_manifest(copied, files=files)
    with pytest.raises(CheckpointError, match=r"lists no train/state.json"):
        checkpoint.load_train_state(copied)


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/hostname", ".."])
def test_a_manifest_stays_in_its_directory(copied: Path, name: str):
    (copied.parent / "outside").write_bytes(b"secret")
    files = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["files"]
    rewrite_manifest(copied, files={**files, name: {"bytes": 6, "sha256": "00"}})
    assert "not one this project writes" in refused(copied, "manifest.json")


@pytest.mark.parametrize(
    "files", [None, [], {"card.md": 3}, {"card.md": {}}, {"card.md": {"bytes": 1}}, "x"]
)
def test_a_list_of_files_that_is_none(copied: Path, files: Any):
    rewrite_manifest(copied, files=files)
    refused(copied, "manifest.json")


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": 2}, {"version": "1"}])
def test_another_format_is_not_guessed_at(copied: Path, changes: dict[str, Any]):
    rewrite_manifest(copied, **changes)
    refused(copied, "manifest.json")
