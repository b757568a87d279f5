"""A hash is remembered only while the file is the same."""

import hashlib
import os
from pathlib import Path

import pytest

from openpalm.base import files
from openpalm.base.files import sha256_of


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a file's content is hashed."""
    names: list[str] = []
    digest = hashlib.file_digest

    def counted(file, algorithm):
        names.append(file.name)
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


def test_it_is_sha256(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a") == expected


def test_a_file_is_hashed_once_until_it_changes(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    first = [sha256_of(file) for _ in range(3)]
    assert len(reads) == 1
    os.rename(file, tmp_path / "b")
    assert sha256_of(tmp_path / "b") in first
    (tmp_path / "b").write_bytes(b"abcd")
    assert sha256_of(tmp_path / "b") != first[0]
    other = tmp_path / "c"
    other.write_bytes(b"other")
    other.replace(tmp_path / "b")
    assert sha256_of(tmp_path / "b") == hashlib.sha256(b"other").hexdigest()


def test_a_modification_time_that_was_set_back_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    sha256_of(file)
    stat = file.stat()
    while file.stat().st_ctime_ns == stat.st_ctime_ns:  # until the clock of the file system ticks
        file.write_bytes(b"xyz")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of(file) == hashlib.sha256(b"xyz").hexdigest()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, reads: list[str]):
    """Two changes within one tick of the file system's clock have the same time."""
    file = tmp_path / "a"
    for content in (b"abc", b"xyz", b"abc"):
        file.write_bytes(content)
        assert sha256_of(file) == hashlib.sha256(content).hexdigest()
    assert len(reads) == 3


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "nowhere")
