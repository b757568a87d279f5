"""A file or folder is replaced whole or not at all, and forced to disk before its name is."""

import os
import subprocess
import sys

import pytest

from openpalm.base import files
from openpalm.base.files import atomic_file, atomic_folder, lock, partial_name, write_atomically


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "new" / "a"
    write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert os.listdir(path.parent) == ["a"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def stopped():
        with atomic_file(path) as file:
            file.write(b"new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_folder_of_a_killed_process_is_removed_and_that_of_another_is_not(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from openpalm.base.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'large').touch(); print('ready', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "a")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, **pipes) as killed, subprocess.Popen(words, **pipes) as other:
        assert killed.stdout.readline() == other.stdout.readline() == b"ready\n"
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == 2
        with atomic_folder(tmp_path / "a"):
            names = {f".a.partial-{pid}" for pid in (other.pid, os.getpid())}
            assert set(os.listdir(tmp_path)) == names
        other.kill()


def test_a_new_folder_that_another_process_removed_is_made_again(tmp_path, monkeypatch):
    def removed_first(descriptor):
        monkeypatch.setattr(files, "lock", lock)
        files._remove_abandoned(partial_name(tmp_path / "a"))  # it is not locked yet
        return lock(descriptor)

    monkeypatch.setattr(files, "lock", removed_first)
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "text").write_text("new")
    assert os.listdir(tmp_path / "a") == ["text"]
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    for text in ("first", "second"):
        with atomic_folder(path) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(text)
        assert (path / "deep" / "file").read_text() == text

    def interrupted():
        with atomic_folder(path) as folder:
            (folder / "other").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "deep" / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["a"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noting(descriptor):
        # Which file it was, by name, and whether the final name existed already.
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.relpath(path, tmp_path), (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    partial = partial_name(tmp_path / "a").name
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    wanted = [(f"{partial}/deep/file", False), (f"{partial}/deep", False), (partial, False)]
    assert sorted(synced) == sorted([*wanted, (".", True)])


def test_a_lock_keeps_another_process_out_until_the_file_is_closed(tmp_path):
    asks = (
        "import sys; from openpalm.base.files import lock\n"
        "file = open(sys.argv[1], 'ab'); print(lock(file.fileno()))"
    )

    def other():
        words = [sys.executable, "-c", asks, str(tmp_path / "a")]
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()

    with (tmp_path / "a").open("ab") as file:
        assert lock(file.fileno())
        assert other() == "False"
    assert other() == "True"
