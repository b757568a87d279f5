"""The manifest of a prepared dataset: its files with sizes and SHA-256, its inputs and settings.

It holds no times and no details of the machine, so one input always gives the same bytes. Reading
trusts nothing: every type, name and size is checked before a file is opened.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from openpalm.base.files import sha256_of
from openpalm.base.typed import checked
from openpalm.base.workers import available_cores
from openpalm.errors import DataError, SettingsError, count_of

NAME = "manifest.json"
PART_NAME = "part.json"
FORMAT = "openpalm-tokens"
PART_FORMAT = "openpalm-part"
VERSION = 1
SPLITS = ("train", "val")
ITEM_BYTES = {"uint16": 2, "uint32": 4}
OFFSET_BYTES = 8
MAX_MANIFEST_BYTES = 64 << 20
NOT_IN_FILE = ("unchanged", "left_out")
REMEDY = "remove the folder and run `openpalm data prepare` again"


@dataclass(frozen=True, slots=True)
class FileEntry:
    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitEntry:
    """`bytes` counts the UTF-8 bytes of the text that `tokens` spell, without end markers.

    `lost` counts the bytes of text that the vocabulary could not spell; they are not in `bytes`.
    A text that the boundary between the splits cuts in two is a document of both. `dropped` counts
    the sequences that --min-unique-tokens left out.
    """

    documents: int
    tokens: int
    bytes: int
    files: tuple[FileEntry, ...]
    lost: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class InputEntry:
    """`sha256` is the file's own, or for several files that of their digests, a line each."""

    given: str
    files: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DocumentCounts:
    read: int
    duplicates: int
    blank: int


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """What decides the bytes of a dataset, besides its inputs.

    Settings with a default are in the file only where they differ from it: manifests of versions
    that did not have them stay the same.
    """

    tokenizer: str
    text_field: str
    val_fraction: float
    val: str
    dedup: str
    shard_tokens: int
    split_text: str = ""
    fix_text: str = "none"
    detokenize: str = "none"
    min_unique_tokens: int = 0
    sequence_tokens: int = 0
    repack_epochs: int = 1
    keep_order: bool = False
    seed: int = 0

    @property
    def repacks(self) -> bool:
        """Whether the tokens are packed again, after all documents are encoded."""
        return self.repack_epochs > 1 or self.min_unique_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """split_by: hash, tail or files; tokenizer: its digest."""

    format: str
    version: int
    dtype: str
    vocab_size: int
    tokenizer: str
    split_by: str
    settings: PrepareSettings
    inputs: tuple[InputEntry, ...]
    documents: DocumentCounts
    splits: dict[str, SplitEntry]
    unchanged: bool = field(default=False, compare=False)
    """Not in the file: whether `prepare` found this dataset already there."""
    left_out: dict[str, int] = field(default_factory=dict, compare=False)
    """Not in the file: how many files of the folders given were not read, by reason."""

    @property
    def digest(self) -> str:
        """Identifies the dataset: covers the hash of every file."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def files(self, folder: Path) -> list[tuple[Path, FileEntry]]:
        """Every file of the dataset in `folder`, as `check_hashes` reads them."""
        return [(folder, file) for entry in self.splits.values() for file in entry.files]

    def to_json(self) -> bytes:
        content = dataclasses.asdict(self)
        for name in NOT_IN_FILE:
            del content[name]
        # Digests of older manifests stay the same.
        content["settings"] = without_defaults(self.settings)
        content["splits"] = {n: without_defaults(split) for n, split in self.splits.items()}
        return (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode()

    def to_part(self, shard: str) -> bytes:
        """The content of part.json, the manifest of one job of several."""
        part = {"format": PART_FORMAT, "shard": shard, "manifest": json.loads(self.to_json())}
        return (json.dumps(part, indent=2, ensure_ascii=True) + "\n").encode()


def without_defaults(entry: "PrepareSettings | SplitEntry") -> dict[str, Any]:
    """The fields of an entry, without those that have their default."""
    content = dataclasses.asdict(entry)
    own = {one.name: one.default for one in dataclasses.fields(entry)}
    return {name: value for name, value in content.items() if value != own[name]}


M = TypeVar("M", bound=Manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset folder; checks that every file exists with its size.

    Raises DataError where it is missing, torn, altered or of another version.
    """
    path = folder / NAME
    return _checked(path, read_content(path, FORMAT), whole=True)


def format_of(folder: Path) -> str | None:
    """The format that the manifest in a folder names; None where there is no manifest of ours."""
    try:
        with (folder / NAME).open("rb") as file:
            # Ours begin with the format; the whole file is checked when it is read.
            found = re.match(rb'\{\s*"format": "([\w-]{1,40})"', file.read(200))
    except OSError:
        return None
    return found and found[1].decode()


def read_part(folder: Path) -> tuple[str, Manifest]:
    """I/N and the manifest of one job's part, with the checks of `read_manifest`."""
    path = folder / PART_NAME
    part = read_content(path, PART_FORMAT)
    content = typed(dict[str, Any], part.get("manifest"), str(path), "manifest")
    return typed(str, part.get("shard"), str(path), "shard"), _checked(path, content, whole=False)


def shard_names(split: str, shard: int) -> tuple[str, str]:
    """The token file and the index file of a shard."""
    return f"{split}-{shard:05d}.bin", f"{split}-{shard:05d}.idx"


def _checked(path: Path, content: dict[str, Any], *, whole: bool) -> Manifest:
    manifest = parse(content, path, Manifest)
    for split, entry in manifest.splits.items():
        # A job may have found nothing for one of the splits.
        if whole or entry.files:
            _check_split(path, manifest, split, entry)
        for file in entry.files:
            check_size(path.parent / file.name, file.size)
    return manifest


def read_content(path: Path, wanted: str) -> dict[str, Any]:
    """The JSON object of a manifest of the format `wanted`. Raises DataError."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: more than {MAX_MANIFEST_BYTES} bytes is no manifest")
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        job = wanted == FORMAT and (path.parent / PART_NAME).exists()
        verb = "build` on all parts" if job else "prepare`"
        raise DataError(
            f"{path.parent}: no prepared dataset here (no {path.name}); run `openpalm data {verb}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); {REMEDY}") from None
    if not isinstance(content, dict) or content.get("format") != wanted:
        raise DataError(f"{path}: is not a manifest of {wanted}; name a folder that prepare wrote")
    return content


def parse(content: dict[str, Any], path: Path, kind: type[M]) -> M:
    """The content as a manifest of class `kind`, every field checked. Raises DataError."""
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {str(content.get('version'))[:20]}, this OpenPaLM reads "
            f"{VERSION}; prepare the data again"
        )
    for name in NOT_IN_FILE:
        content.pop(name, None)
    manifest: M = typed(kind, content, str(path))
    if manifest.dtype not in ITEM_BYTES:
        raise DataError(f"{path}: dtype must be {' or '.join(ITEM_BYTES)}; {REMEDY}")
    if set(manifest.splits) != set(SPLITS):
        raise DataError(f"{path}: splits must be {' and '.join(SPLITS)}; {REMEDY}")
    if not 0 < manifest.vocab_size <= 1 << 8 * ITEM_BYTES[manifest.dtype]:
        raise DataError(
            f"{path}: vocab_size {manifest.vocab_size} does not fit {manifest.dtype}; {REMEDY}"
        )
    return manifest


def _check_split(path: Path, manifest: Manifest, split: str, entry: SplitEntry) -> None:
    """Names are exactly ours, so none leaves the folder; sizes agree with the counts."""
    shards = len(entry.files) // 2
    expected = [name for shard in range(shards) for name in shard_names(split, shard)]
    if not shards or [file.name for file in entry.files] != expected:
        raise DataError(f"{path}: the files of {split} are not the ones prepare writes; {REMEDY}")
    tokens = sum(file.size for file in entry.files[::2])
    offsets = sum(file.size for file in entry.files[1::2])
    item = ITEM_BYTES[manifest.dtype]
    uneven = any(file.size % item or not file.size for file in entry.files[::2])
    if uneven or tokens != entry.tokens * item or offsets != entry.documents * OFFSET_BYTES:
        raise DataError(f"{path}: the sizes of {split} contradict its counts; {REMEDY}")


def check_size(path: Path, size: int) -> None:
    """Raises DataError where a file is missing or has another size."""
    try:
        found = path.stat().st_size
    except OSError:
        raise DataError(f"{path}: is missing; {REMEDY}") from None
    if found != size:
        raise DataError(f"{path}: {count_of(found, 'byte')}, the manifest says {size}; {REMEDY}")


def check_hashes(
    files: Sequence[tuple[Path, FileEntry]], progress: Callable[[int, int], None] | None = None
) -> None:
    """Compares the SHA-256 of each file (folder, entry) with its entry, on all cores.

    A file that did not change since this process last hashed it is not read again. `progress`
    gets (bytes done, bytes in total). Raises DataError for the first that was altered.
    """
    total, done = sum(entry.size for _, entry in files), 0
    pool = ThreadPoolExecutor(available_cores())
    try:
        for (folder, entry), found in zip(files, pool.map(_hash_of, files), strict=True):
            if found != entry.sha256:
                raise DataError(
                    f"{folder / entry.name}: was altered, its SHA-256 is not the manifest's; "
                    f"restore it, or {REMEDY}"
                )
            done += entry.size
            if progress:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def own_share(files: Sequence[FileEntry]) -> Sequence[FileEntry]:
    """The files that this process checks: the ranks of one machine divide the work."""
    rank, count = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        return files
    return files[int(rank) :: int(count)]


def _hash_of(file: tuple[Path, FileEntry]) -> str:
    path = file[0] / file[1].name
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def typed(kind: Any, value: object, where: str, name: str = "") -> Any:
    """`value` from JSON as the dataclass, tuple, dict or scalar `kind`. Raises DataError."""
    try:
        return checked(kind, value, name, exact=True)
    except SettingsError as error:
        raise DataError(f"{where}: {error}; {REMEDY}") from None
