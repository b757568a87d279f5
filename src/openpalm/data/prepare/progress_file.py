"""The folder of an unfinished dataset: locked, with a progress file that a killed run resumes from.

While the progress file (manifest.json.partial) exists, the files next to it are ours and
unfinished. Each of its lines of JSON says what was requested or how far the work is. The files it
describes reach the disk before the line does, and a torn last line is cut off; so the same
command resumes after a kill at any moment.
"""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from openpalm.base.files import flush, lock, write_atomically
from openpalm.data.corpus.line_streams import Unavailable, unreadable
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import SplitEntry
from openpalm.errors import DataError, StorageError

PARTIAL = manifest_file.NAME + ".partial"
BASE = "base-"
"""prefix of the files of a split that is encoded, but not repacked yet"""
_SCRATCH = (
    r"(documents|blocks|splits|bucket-\d+|(manifest|part)\.json)\.partial"
    r"|base-(train|val)-\d{5}\.(bin|idx)"
    r"|\.(manifest|part)\.json\.partial-\d+"
)
_SCRATCH_NAMES = re.compile(_SCRATCH)
OUR_NAMES = re.compile(r"(train|val)-\d{5}\.(bin|idx)|tokenizer\.json|" + _SCRATCH)
MAX_FILE_BYTES = 64 << 30
MAX_LINE_BYTES = 64 << 20
CHECKPOINT_S = 5.0


@dataclass(frozen=True, slots=True)
class ScannedSource:
    """A source that the first pass has read: its raw bytes, their hash, its documents."""

    name: str
    bytes: int
    sha256: str
    documents: int
    blocks: int


@dataclass(frozen=True, slots=True)
class ScanPosition:
    """Documents and blocks already scanned of the source that is being scanned."""

    documents: int
    blocks: int


@dataclass(frozen=True, slots=True)
class WritePosition:
    """The first segment not yet in the shards, and the content of each split so far.

    The last two files of a split are still open.
    """

    source: int
    segment: int
    splits: dict[str, SplitEntry]


@dataclass(frozen=True, slots=True)
class RepackPosition:
    """The split that is being repacked, and the tokens of its stream that are done.

    cut: whether the last sequence was dropped; dropped_bytes: the text of those that were;
    splits: the content of each split so far.
    """

    split: str
    read: int
    cut: bool
    dropped_bytes: int
    splits: dict[str, SplitEntry]


Note = ScannedSource | ScanPosition | WritePosition | RepackPosition
_LINES = {
    "scanned": ScannedSource,
    "scanning": ScanPosition,
    "written": WritePosition,
    "repacked": RepackPosition,
}
"""key of a line -> its content"""


@dataclass(slots=True)
class Progress:
    scanned: list[ScannedSource] = field(default_factory=list)
    scanning: ScanPosition = ScanPosition(0, 0)
    tokenizer: str = ""
    written: WritePosition | None = None
    repacked: RepackPosition | None = None


class UnfinishedDataset:
    """The folder of a dataset that this process is making. `progress` says how far it is."""

    def __init__(self, folder: Path, file: BinaryIO, request: dict[str, str]):
        self.folder, self.progress = folder, Progress()
        self._file, self._pending = file, bytearray()
        self.keep = False
        """whether the work so far is kept when the request turns out to be wrong"""
        self._resume(request)

    def note(self, progress: Note) -> None:
        """Adds a line, written at the next checkpoint."""
        key = next(key for key, kind in _LINES.items() if type(progress) is kind)
        self._add_line(key, dataclasses.asdict(progress))

    def note_tokenizer(self, digest: str) -> None:
        self._add_line("tokenizer", digest)

    def is_due(self) -> bool:
        """Whether the last checkpoint is more than CHECKPOINT_S ago."""
        return time.monotonic() - self._checkpoint_at >= CHECKPOINT_S

    def checkpoint(self, *files: BinaryIO) -> None:
        """Forces `files` to disk, then the lines that describe them."""
        self._checkpoint_at = time.monotonic()
        for file in files:
            flush(file)
        self._file.write(self._pending)
        self._pending.clear()
        flush(self._file)

    def commit(self, name: str, content: bytes) -> None:
        """Writes the manifest: from this instant on the dataset exists."""
        write_atomically(self.folder / name, content)
        remove_scratch(self.folder)

    def _add_line(self, key: str, value: object) -> None:
        self._pending += json.dumps({key: value}).encode() + b"\n"

    def _resume(self, request: dict[str, str]) -> None:
        path = self.folder / PARTIAL
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: more than {MAX_FILE_BYTES} bytes; {manifest_file.REMEDY}")
        begun, end = None, 0
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                begun = self._read(line, f"{path}") or begun
        if begun is None:
            # A kill before the first line: nothing in the folder can be trusted.
            remove_ours(self.folder, keep=PARTIAL)
            end = 0
            self._add_line("begun", request)
        elif begun != request:
            names = {**request, **begun}
            other = ", ".join(name for name in names if begun.get(name) != request.get(name))
            raise DataError(
                f"--out {self.folder}: holds an unfinished dataset (other {other}); repeat the "
                "command that began it, choose another --out, or remove it first"
            )
        self._file.truncate(end)
        self.checkpoint()

    def _read(self, line: bytes, where: str) -> dict[str, str] | None:
        """Takes a line into `progress`; returns the request that began the dataset."""
        try:
            ((key, value),) = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError):
            raise DataError(
                f"{where}: is no progress file of ours; {manifest_file.REMEDY}"
            ) from None
        progress = self.progress
        if key == "begun":
            return manifest_file.typed(dict[str, str], value, where)
        if key == "scanned":
            progress.scanned.append(manifest_file.typed(ScannedSource, value, where))
            progress.scanning = ScanPosition(0, 0)
        elif key == "scanning":
            progress.scanning = manifest_file.typed(ScanPosition, value, where)
        elif key == "tokenizer":
            progress.tokenizer = manifest_file.typed(str, value, where)
        elif key == "repacked":
            progress.repacked = manifest_file.typed(RepackPosition, value, where)
        else:
            progress.written = manifest_file.typed(WritePosition, value, where)
        return None


@contextlib.contextmanager
def claim_folder(out: Path, request: dict[str, str]) -> Iterator[UnfinishedDataset]:
    """Locks the folder for this process, and resumes the unfinished work in it.

    `request` describes the dataset: DataError where the folder holds unfinished work of another.
    A DataError in the block removes the work; every other error keeps it for the next attempt,
    and so does a source that cannot be read at the moment.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / PARTIAL).open("ab") as file:
            _lock(file, out)
            unfinished = UnfinishedDataset(out, file, request)
            try:
                yield unfinished
            except DataError as error:
                if not (unfinished.keep or isinstance(error, Unavailable)):
                    with contextlib.suppress(OSError):
                        remove_ours(out)
                        if new:
                            out.rmdir()
                raise
    except OSError as error:
        name = Path(str(error.filename or out))
        # The error may be about a source, not about our folder.
        if not (name.is_relative_to(out) or out.is_relative_to(name)):
            raise unreadable(name, error) from None
        raise StorageError(
            f"--out {error.filename or out}: cannot be written ({error.strerror}); "
            "free some space and repeat the command (it continues), or choose another --out"
        ) from None


def remove_scratch(out: Path) -> None:
    """Removes the files that a finished dataset does not need, the progress file last."""
    for path in list(out.iterdir()):
        if _SCRATCH_NAMES.fullmatch(path.name) and path.name != PARTIAL:
            path.unlink(missing_ok=True)
    (out / PARTIAL).unlink(missing_ok=True)


def remove_ours(out: Path, keep: str = "") -> None:
    for entry in list(out.iterdir()):
        if OUR_NAMES.fullmatch(entry.name) and entry.name != keep:
            entry.unlink()


def _lock(file: BinaryIO, out: Path) -> None:
    if not lock(file.fileno()):
        raise DataError(f"--out {out}: another process is preparing it; wait for it")
    # Checked under the lock: the process that held it may have finished meanwhile.
    if any((out / name).exists() for name in (manifest_file.NAME, manifest_file.PART_NAME)):
        raise DataError(f"--out {out}: another process has just prepared it; repeat the command")
