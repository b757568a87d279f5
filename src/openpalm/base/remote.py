"""Files at URLs (s3://, gs://, hf://, memory://, ...) through fsspec: reading, listing, copying.

Errors of every file system become OSErrors with the URL as their file name, so that callers treat
them like those of a disk. Credentials are those of each file system's own library.
"""

import errno
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from openpalm.base.files import atomic_file
from openpalm.errors import SettingsError, StorageError, WorkError, one_line

READ_BYTES = 4 << 20
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_EXTRAS = {"s3": "cloud", "s3a": "cloud", "gs": "cloud", "gcs": "cloud"}
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf")
_MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at a URL, with the methods of Path that readers use."""

    url: str
    size: int

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def parents(self) -> tuple[Path, ...]:
        return ()

    def resolve(self) -> "RemoteFile":
        return self

    def is_file(self) -> bool:
        return True

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=self.size)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """A binary reader. Raises OSError here and while reading, also where the file is short."""
        assert mode == "rb"
        raw = _Reader(self)
        return raw if buffering == 0 else io.BufferedReader(raw, 1 << 20)


def remote_files(url: str) -> tuple[list[RemoteFile], bool]:
    """The files at a URL, sorted, and whether it names one file itself, not a folder or glob.

    Raises OSError, SettingsError for a file system that is unknown or not installed.
    """
    fs, path = file_system(url)
    prefix = url[: url.index("://") + 3]
    with _errors(url):
        if any(char in url for char in "*?["):
            found = fs.glob(path, detail=True)
        elif (info := fs.info(path))["type"] == "file":
            return [RemoteFile(url, info["size"])], True
        else:
            found = fs.find(path, detail=True)
    files = [
        RemoteFile(prefix + name.removeprefix(prefix).lstrip("/"), info["size"])
        for name, info in sorted(found.items())
        if info["type"] == "file"
    ]
    return files, False


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    import fsspec

    protocol = url.partition("://")[0].lower()
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'openpalm[{extra}]'" if extra else one_line(error)
        raise SettingsError(f"{url}: {protocol}:// is not installed; {remedy}") from None
    except ValueError:
        raise SettingsError(
            f"{url}: {protocol}:// is not known; use s3://, gs://, hf:// or another of fsspec's"
        ) from None
    except Exception as error:  # a library's own errors of credentials and settings
        raise _os_error(error, url) from None


@dataclass(frozen=True, slots=True)
class Copied:
    """left_out: names of hidden and unfinished files, links and pipes, that were not copied."""

    files: int
    bytes: int
    left_out: tuple[str, ...] = ()


def copy_folder(source: str, target: str, progress: Progress | None = None) -> Copied:
    """Copies a folder to or from a URL.

    manifest.json comes last: a copy that was interrupted has none. A target with the same manifest
    is left as it is (0 files). Raises SettingsError for a source or target that cannot be used,
    WorkError or StorageError where copying fails.
    """
    if is_url(source) == is_url(target):
        raise SettingsError(f"{source}, {target}: one must be a local path, the other a URL")
    try:
        return _copy(source.rstrip("/"), target.rstrip("/"), progress or (lambda done, total: None))
    except OSError as error:
        name, reason = error.filename or target, error.strerror or error
        if is_url(str(name)):
            raise WorkError(
                f"{name}: {reason}; repeat the command when it can be reached"
            ) from None
        raise StorageError(f"{name}: {reason}; free some space, or choose another path") from None


def _copy(source: str, target: str, progress: Progress) -> Copied:
    found = _remote_names(source) if is_url(source) else _local_names(Path(source))
    files = _in_order({name: size for name, size in found.items() if size is not None})
    if not files:
        raise SettingsError(f"{source}: no files here; name a folder with files")
    theirs = _manifest_at(target)
    if theirs is not None:
        if _MANIFEST in files and theirs == _manifest_at(source):
            return Copied(0, 0)
        raise SettingsError(f"{target}: holds something else already (other {_MANIFEST})")
    total, done = sum(files.values()), 0
    for name, size in files.items():
        move = _download if is_url(source) else _upload
        move(f"{source}/{name}", f"{target}/{name}", size)
        done += size
        progress(done, total)
    return Copied(len(files), total, tuple(name for name, size in found.items() if size is None))


def _local_names(folder: Path) -> dict[str, int | None]:
    """Relative name -> size; None for what is not copied."""
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder; check the path")
    found = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        if path.is_file() and not path.is_symlink()
        else None
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    return {name: None if _is_hidden(name) else size for name, size in found.items()}


def _remote_names(url: str) -> dict[str, int | None]:
    try:
        files, is_one = remote_files(url)
    except FileNotFoundError:
        raise SettingsError(f"{url}: no such folder; check the address") from None
    if is_one:
        raise SettingsError(f"{url}: is a file; name its folder")
    found = {file.url.removeprefix(url).lstrip("/"): file.size for file in files}
    if any(".." in PurePosixPath(name).parts for name in found):
        raise SettingsError(f"{url}: holds names with `..`; they are not copied")
    return {name: None if _is_hidden(name) else size for name, size in found.items()}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/")) or ".partial" in name


def _in_order(files: dict[str, int]) -> dict[str, int]:
    """Manifests last, the one of the folder itself behind those inside it."""

    def late(name: str) -> tuple[bool, int, str]:
        is_manifest = PurePosixPath(name).name == _MANIFEST
        return is_manifest, -name.count("/") if is_manifest else 0, name

    return {name: files[name] for name in sorted(files, key=late)}


def _manifest_at(folder: str) -> bytes | None:
    if not is_url(folder):
        path = Path(folder) / _MANIFEST
        return path.read_bytes() if path.is_file() else None
    url = f"{folder}/{_MANIFEST}"
    fs, path = file_system(url)
    try:
        with _errors(url):
            return fs.cat_file(path)
    except FileNotFoundError:
        return None


def _upload(source: str, url: str, size: int) -> None:
    fs, path = file_system(url)
    with _errors(url):
        # Object stores have no folders, and makedirs would make a misspelt bucket.
        if url.partition("://")[0] not in OBJECT_STORES:
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.put_file(source, path)
        fs.invalidate_cache()
        found = fs.info(path)["size"]
    if found != size:
        raise OSError(errno.EIO, f"has {found} bytes after the upload, {size} were sent", url)


def _download(url: str, target: str, size: int) -> None:
    with RemoteFile(url, size).open("rb") as reader, atomic_file(Path(target)) as file:
        while data := reader.read(READ_BYTES):
            file.write(data)


class _Reader(io.RawIOBase):
    """A raw reader of a RemoteFile. A file that ends before its size is an error, not its end."""

    def __init__(self, file: RemoteFile):
        self._remote = file
        self._file: Any = None  # for `close`, which Python also calls when this fails
        fs, path = file_system(file.url)
        with _errors(file.url):
            self._file = fs.open(path, mode="rb", block_size=READ_BYTES)
            # The objects of memory:// keep the position of their last reader.
            self._file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _errors(self._remote.url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        with _errors(self._remote.url):
            at = self._file.tell()
            data = self._file.read(len(buffer))
        if not data and len(buffer) and at < self._remote.size:
            raise OSError(errno.EIO, f"ends at byte {at} of {self._remote.size}", self._remote.url)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turns every error of a file system into an OSError with a code and the URL."""
    try:
        yield
    except Exception as error:  # each library has its own types
        raise _os_error(error, url) from None


def _os_error(error: Exception, url: str) -> OSError:
    kind, reason = type(error).__name__, one_line(error, 200)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file or bucket", url)
    if isinstance(error, PermissionError) or re.search("Credential|Forbidden|Unauthor", kind):
        reason = f"not permitted: {reason or kind}; check the credentials"
        return PermissionError(errno.EACCES, reason, url)
    return OSError(errno.EIO, f"{kind}: {reason}" if reason else kind, url)
