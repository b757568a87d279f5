"""An unfinished dataset: a folder claimed, and how far the work in it has come.

While the partial manifest is there, what lies beside it is ours and unfinished. Its lines of JSON
say what was asked for and what is done: the files they speak of reached the disk before them, and
a torn last line is cut off. So the same command goes on after a kill at any moment.
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
OUR_NAMES = re.compile(
    r"(train|val)-\d{5}\.(bin|idx)|tokenizer\.json|(manifest|part)\.json\.(partial|new)"
    r"|(documents|blocks|fates|bucket-\d+)\.partial"
)
MAX_JOURNAL_BYTES = 64 << 30
MAX_ROW_BYTES = 64 << 20
CHECKPOINT_S = 5.0


@dataclass(frozen=True, slots=True)
class Scanned:
    """A source that the first pass has read: its raw bytes, their hash, what it holds."""

    name: str
    bytes: int
    sha256: str
    documents: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Scanning:
    """How much of the source after those that were scanned is in the records."""

    documents: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Written:
    """The first segment not yet in the shards, and what they hold; of a split's files, the last
    two are still open."""

    source: int
    segment: int
    splits: dict[str, SplitEntry]


@dataclass(slots=True)
class Progress:
    scanned: list[Scanned] = field(default_factory=list)
    scanning: Scanning = Scanning(0, 0)
    tokenizer: str = ""
    written: Written | None = None


class Unfinished:
    """The folder of a dataset being made, this process's alone. `done` says how far it has come."""

    def __init__(self, folder: Path, journal: BinaryIO, wanted: dict[str, str]):
        self.folder, self.done = folder, Progress()
        self._journal, self._pending = journal, bytearray()
        self.keep = False
        """Whether an error in the request leaves what was done."""
        self._resume(wanted)

    def note(self, row: Scanned | Scanning | Written) -> None:
        """Remembers a row until the next checkpoint."""
        self._line(type(row).__name__.lower(), dataclasses.asdict(row))

    def note_tokenizer(self, digest: str) -> None:
        self._line("tokenizer", digest)

    def is_due(self) -> bool:
        """Whether enough would be lost by a kill to make it durable now."""
        return time.monotonic() - self._durable_at >= CHECKPOINT_S

    def checkpoint(self, *files: BinaryIO) -> None:
        """Makes `files`, and after them what was noted, durable."""
        self._durable_at = time.monotonic()
        for file in files:
            flush(file)
        self._journal.write(self._pending)
        self._pending.clear()
        flush(self._journal)

    def commit(self, name: str, content: bytes) -> None:
        """The one instant at which the dataset begins to exist."""
        write_atomically(self.folder / name, content)
        remove_scratch(self.folder)

    def _line(self, name: str, value: object) -> None:
        self._pending += json.dumps({name: value}).encode() + b"\n"

    def _resume(self, wanted: dict[str, str]) -> None:
        where = self.folder / PARTIAL
        if where.stat().st_size > MAX_JOURNAL_BYTES:
            raise DataError(f"{where}: more than {MAX_JOURNAL_BYTES} bytes; {manifest_file.REMEDY}")
        begun, end = None, 0
        with where.open("rb") as file:
            while line := file.readline(MAX_ROW_BYTES):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                begun = self._read(line, f"{where}") or begun
        if begun is None:
            remove_ours(self.folder, keep=PARTIAL)
            end = 0
            self._line("begun", wanted)
        elif begun != wanted:
            other = ", ".join(name for name in wanted if begun.get(name) != wanted[name])
            raise DataError(
                f"--out {self.folder}: holds an unfinished dataset (other {other}); repeat the "
                "command that began it, choose another --out, or remove it first"
            )
        self._journal.truncate(end)
        self.checkpoint()

    def _read(self, line: bytes, where: str) -> dict[str, str] | None:
        try:
            ((name, value),) = json.loads(line).items()
        except (ValueError, AttributeError, RecursionError):
            raise DataError(f"{where}: is no journal of ours; {manifest_file.REMEDY}") from None
        done = self.done
        if name == "begun":
            return manifest_file.typed(dict[str, str], value, where)
        if name == "scanned":
            done.scanned.append(manifest_file.typed(Scanned, value, where))
            done.scanning = Scanning(0, 0)
        elif name == "scanning":
            done.scanning = manifest_file.typed(Scanning, value, where)
        elif name == "tokenizer":
            done.tokenizer = manifest_file.typed(str, value, where)
        else:
            done.written = manifest_file.typed(Written, value, where)
        return None


@contextlib.contextmanager
def claimed(out: Path, wanted: dict[str, str]) -> Iterator[Unfinished]:
    """The folder, ours alone while the mark in it is locked.

    `wanted` says what is asked for; DataError where the folder holds other unfinished work. An
    error in the request removes what was done; anything else keeps it for the next attempt, a
    source that cannot be read at the moment too.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / PARTIAL).open("ab") as partial:
            _lock(partial, out)
            unfinished = Unfinished(out, partial, wanted)
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
        if not (name.is_relative_to(out) or out.is_relative_to(name)):  # a source's
            raise unreadable(name, error) from None
        raise StorageError(
            f"--out {error.filename or out}: cannot be written ({error.strerror}); "
            "free some space and repeat the command (it goes on), or choose another --out"
        ) from None


def remove_scratch(out: Path) -> None:
    """What a finished dataset does not need; the mark last."""
    for path in [*out.glob("*.partial"), *out.glob("*.json.new")]:
        if OUR_NAMES.fullmatch(path.name) and path.name != PARTIAL:
            path.unlink(missing_ok=True)
    (out / PARTIAL).unlink(missing_ok=True)


def remove_ours(out: Path, keep: str = "") -> None:
    for entry in list(out.iterdir()):
        if OUR_NAMES.fullmatch(entry.name) and entry.name != keep:
            entry.unlink()


def _lock(partial: BinaryIO, out: Path) -> None:
    if not lock(partial.fileno()):
        raise DataError(f"--out {out}: another process is preparing it; wait for it")
    if any((out / name).exists() for name in (manifest_file.NAME, manifest_file.PART_NAME)):
        raise DataError(f"--out {out}: another process has just prepared it; repeat the command")
