"""Files at URLs, with fsspec's file system in memory in place of a distant one."""

import errno
import os

import fsspec
import pytest

from openpalm.base import remote
from openpalm.base.remote import Copied, RemoteFile, copy_folder, is_url, remote_files
from openpalm.cli.main import main
from openpalm.errors import SettingsError, WorkError


@pytest.fixture
def memory():
    """The file system of memory://, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    (folder / "train").mkdir(parents=True)
    for name in ("manifest.json", "model.bin", "train/state.bin", ".lock", ".a.partial-7"):
        (folder / name).write_bytes(name.encode() * 999)
    return folder


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_urls_are_told_from_paths():
    assert all(map(is_url, ("s3://b/x", "memory://x", "hf://datasets/a/b", "file:///x")))
    assert not any(map(is_url, ("a/b", "/a", "hub:a/b", "builtin:x", "c:/x", "a//b", "./s3://b")))


def test_a_reader_reads_what_a_file_has(memory):
    data = bytes(range(256)) * 40_000
    memory.pipe_file("/b/x.bin", data)
    file = RemoteFile("memory://b/x.bin", len(data))
    assert (file.name, file.suffix, str(file)) == ("x.bin", ".bin", "memory://b/x.bin")
    for buffering in (0, -1):
        with file.open(buffering=buffering) as reader:
            assert b"".join(iter(lambda reader=reader: reader.read(100_000), b"")) == data
            reader.seek(500)
            assert reader.read(3) == data[500:503]
    # A whole read is never short: the pieces of a text depend on the file alone.
    with file.open() as reader:
        assert len(reader.read(9_000_000)) == 9_000_000


def test_a_file_that_ends_early_is_an_error(memory):
    memory.pipe_file("/b/x.bin", b"x" * 100)
    reader = RemoteFile("memory://b/x.bin", 150).open()
    with reader, pytest.raises(OSError, match="ends at byte 100 of 150") as error:
        reader.read()
    assert (error.value.errno, error.value.filename) == (errno.EIO, "memory://b/x.bin")


def test_a_reader_that_cannot_be_opened_can_be_closed(memory):
    """Python closes it when it is collected; since 3.13 an error there is printed."""
    reader = remote._Reader.__new__(remote._Reader)
    with pytest.raises(OSError, match="memory://b/none"):
        reader.__init__(RemoteFile("memory://b/none", 1))
    reader.close()
    assert reader.closed


def test_files_of_a_url_are_found_and_sorted(memory):
    for name in ("b/c.txt", "b/a.txt", "b/d/e.txt", "other.txt"):
        memory.pipe_file(f"/{name}", b"1234")
    assert remote_files("memory://b/a.txt") == ([RemoteFile("memory://b/a.txt", 4)], True)
    for url, names in (
        ("memory://b", ["b/a.txt", "b/c.txt", "b/d/e.txt"]),
        ("memory://b/*.txt", ["b/a.txt", "b/c.txt"]),
        ("memory://b/**/e.txt", ["b/d/e.txt"]),
    ):
        files, is_one = remote_files(url)
        assert [file.url for file in files] == [f"memory://{name}" for name in names]
        assert not is_one
    with pytest.raises(FileNotFoundError):
        remote_files("memory://none")


def test_a_folder_goes_out_and_comes_back(memory, folder, tmp_path):
    order, put = [], type(memory).put_file

    def noting(self, source, path, **options):
        order.append(path)
        return put(self, source, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "put_file", noting)
        assert copy_folder(str(folder), "memory://b/checkpoint").files == 3
    assert [path.rpartition("/")[2] for path in order][-1] == "manifest.json"
    shown = {n: c for n, c in contents(folder).items() if not n.startswith(".")}
    assert {p.removeprefix("/b/checkpoint/"): f.getvalue() for p, f in memory.store.items()} == (
        shown
    )
    seen = []
    copied = copy_folder(
        "memory://b/checkpoint/", str(tmp_path / "back"), lambda *at: seen.append(at)
    )
    total = sum(map(len, shown.values()))
    assert copied == Copied(3, total)
    assert seen[-1] == (total, total)
    assert contents(tmp_path / "back") == shown


def test_what_is_not_copied_is_named(memory, folder):
    (folder / "best").symlink_to(folder / "train")
    (folder / "model.link").symlink_to(folder / "model.bin")
    os.mkfifo(folder / "pipe")
    found = copy_folder(str(folder), "memory://b/c")
    assert set(found.left_out) == {".lock", ".a.partial-7", "best", "model.link", "pipe"}
    assert {path.removeprefix("/b/c/") for path in memory.store} == {
        *("model.bin", "train/state.bin", "manifest.json")
    }


def test_a_copy_that_is_there_is_left_and_another_is_refused(memory, folder, tmp_path):
    copy_folder(str(folder), "memory://b/c")
    assert copy_folder(str(folder), "memory://b/c") == Copied(0, 0)
    (folder / "manifest.json").write_bytes(b"other")
    with pytest.raises(SettingsError, match="memory://b/c: holds something else already"):
        copy_folder(str(folder), "memory://b/c")
    with pytest.raises(SettingsError, match="holds something else already"):
        copy_folder("memory://b/c", str(folder))


def test_an_interrupted_copy_has_no_manifest_and_continues(memory, folder, tmp_path, monkeypatch):
    def lost(self, source, path, **options):
        if path.endswith("state.bin"):
            raise ConnectionError("connection\nreset by peer")
        return put(self, source, path, **options)

    put = type(memory).put_file
    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", lost)
        with pytest.raises(
            WorkError, match=r"state.bin: ConnectionError: connection reset by peer"
        ):
            copy_folder(str(folder), "memory://b/c")
    assert "/b/c/manifest.json" not in memory.store
    assert copy_folder(str(folder), "memory://b/c").files == 3
    short = RemoteFile("memory://b/c/model.bin", 10**6)
    names = remote._remote_names("memory://b/c")
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_remote_names", lambda url: names | {"model.bin": short.size})
        with pytest.raises(WorkError, match=r"model.bin: ends at byte 8991 of 1000000; repeat"):
            copy_folder("memory://b/c", str(tmp_path / "back"))
    assert not contents(tmp_path / "back")
    assert copy_folder("memory://b/c", str(tmp_path / "back")).files == 3


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("a", "b", "one must be a local path, the other a URL"),
        ("memory://a", "memory://b", "one must be a local path, the other a URL"),
        ("none", "memory://b", "none: no such folder"),
        ("memory://none", "b", "memory://none: no such folder; check the address"),
        ("memory://one/file", "b", "memory://one/file: is a file; name its folder"),
        ("nosuch://a", "b", "nosuch:// is not known; use s3://"),
    ],
)
def test_requests_that_cannot_be_met(source, target, says, memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory.pipe_file("/one/file", b"x")
    with pytest.raises(SettingsError, match=says):
        copy_folder(source, target)
    assert not list(tmp_path.iterdir())


def test_names_that_leave_the_folder_are_refused(memory, tmp_path, monkeypatch):
    files = [RemoteFile("memory://b/../../x", 3)]
    monkeypatch.setattr(remote, "remote_files", lambda url: (files, False))
    with pytest.raises(SettingsError, match=r"holds names with `..`"):
        copy_folder("memory://b", str(tmp_path / "out"))


def test_a_file_system_that_is_not_installed_names_the_extra(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(SettingsError, match=r"s3:// is not installed; pip install 'openpalm\[cl"):
        remote_files("s3://b/x")
    with pytest.raises(SettingsError, match=r"abfs:// is not installed; Install s3fs"):
        remote_files("abfs://b/x")


def test_names_of_a_bucket_do_not_reach_the_terminal(memory, tmp_path, capsys):
    memory.pipe("/b/c/a", b"1")
    memory.pipe("/b/c/.\x1b[31mred", b"1")
    assert main(["copy", "memory://b/c", str(tmp_path / "here")]) == 0
    output = capsys.readouterr().out
    assert "\\x1b[31mred" in output
    assert "\x1b" not in output
