import hashlib
import os

from openpalm import hashing
from openpalm.hashing import sha256_of


def test_it_is_the_sha256_of_the_content(tmp_path):
    path = tmp_path / "a"
    for content in (b"", b"abc", bytes(range(256)) * 10_000):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_stays_the_same_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    first = sha256_of(path)

    def refuse(file, kind):
        raise AssertionError("read again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    assert sha256_of(path) == first


def test_another_time_size_or_file_is_read_again(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    sha256_of(path)
    found = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert sha256_of(path) == hashlib.sha256(b"abd").hexdigest()
    path.write_bytes(b"abde")
    assert sha256_of(path) == hashlib.sha256(b"abde").hexdigest()
    other = tmp_path / "b"
    other.write_bytes(b"abdf")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert sha256_of(other) == hashlib.sha256(b"abdf").hexdigest()


def test_a_file_that_changes_meanwhile_is_not_remembered(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    digest = hashlib.file_digest

    def changing(file, kind):
        found = digest(file, kind)
        path.write_bytes(b"longer than before")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(hashing.hashlib, "file_digest", changing)
        assert sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
    assert sha256_of(path) == hashlib.sha256(b"longer than before").hexdigest()
