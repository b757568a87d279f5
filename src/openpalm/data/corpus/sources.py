"""Finds the data sources of inputs: files, folders, globs, built-in corpora and Hub datasets.

Checks that everything exists, without reading it.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn, cast

from openpalm.base.remote import is_url, remote_files
from openpalm.data.corpus.builtin import BUILTINS
from openpalm.data.corpus.cleaning import UNCHANGED, Cleaning
from openpalm.data.corpus.line_streams import PACKED, no_tap, open_lines, readable
from openpalm.data.corpus.tar_members import HEADER_BYTES, is_archive
from openpalm.errors import DataError

ROW_NAMES = (".jsonl", ".ndjson", ".json")
PACKINGS = ("", ".gz", ".zst", ".xz")
ROW_SUFFIXES = tuple(name + packed for name in ROW_NAMES for packed in PACKINGS)
TEXT_NAMES = (".txt", ".text", ".md", ".rst")
TEXT_SUFFIXES = tuple(name + packed for name in TEXT_NAMES for packed in PACKINGS)
# Archives are read only if they are named: a folder may have a backup of itself.
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *ROW_SUFFIXES, ".parquet")
ARCHIVE_SUFFIXES = (*(".tar" + packed for packed in PACKINGS), ".tgz", ".txz")
TFRECORDS_SUFFIXES = (".tfrecords", ".tfrecord")
# The pile has 30 files; a list of more than this is something else.
MAX_INDEX_BYTES = 16 << 20
# Read from a .json file in a folder, to see whether its first line is an object.
SNIFFED_BYTES = 1 << 16
HIDDEN, OTHER, LINKED = "hidden", "of another kind", "linked a second time"
BUILTIN_PREFIX = "builtin:"
HUB_PREFIX = "hub:"
TEXT_FIELD = "text"
SPLIT_FILES = {"train": "train.bin", "val": "val.bin"}


@dataclass(frozen=True, slots=True)
class Source:
    """One data source: a file, or a built-in corpus or Hub dataset if `path` is None.

    `given` is the input as the user wrote it. `named` says that the user named this file itself,
    so that an empty file is an error; a folder may have empty files. `split` is train or val if
    the source was split before. `text_field` is the field or column with the text of a row.
    `is_archive`: a .tar, packed or not; `cleaning`: what is changed in its text.
    """

    given: str
    path: Path | None
    named: bool
    split: str | None = None
    text_field: str = TEXT_FIELD
    is_archive: bool = False
    cleaning: Cleaning = UNCHANGED

    @property
    def name(self) -> str:
        return str(self.path or self.given)

    @property
    def is_rows(self) -> bool:
        return self.path is not None and is_rows(self.path)

    @property
    def is_table(self) -> bool:
        return self.path is not None and self.path.name.lower().endswith(".parquet")

    @property
    def is_ids(self) -> bool:
        return self.path is not None and self.path.name.lower().endswith(".bin")

    @property
    def is_tfrecords(self) -> bool:
        return self.path is not None and self.path.name.lower().endswith(TFRECORDS_SUFFIXES)

    @property
    def is_one(self) -> bool:
        """Whether the source is one document, read in pieces."""
        if self.path is None or self.is_rows or self.is_table:
            return False
        if self.is_archive or self.is_tfrecords:
            return False
        return self.is_ids or self.cleaning.split_text is None


def find_sources(
    inputs: Sequence[str],
    left_out: Counter[str] | None = None,
    *,
    text_field: str = TEXT_FIELD,
    cleaning: Cleaning = UNCHANGED,
) -> list[Source]:
    """Expands folders, globs and .index files, and checks that everything exists.

    `left_out` counts the skipped entries of folders, by reason.
    """
    if not inputs:
        raise DataError("no input; name a file, a folder, a glob or builtin:python-docs")
    left_out = Counter() if left_out is None else left_out
    found = (source for given in inputs for source in _expand(given, left_out))
    sources = [replace(source, text_field=text_field, cleaning=cleaning) for source in found]
    split = [source for source in sources if source.split]
    if split and len(split) < len(sources):
        raise DataError(
            f"{split[0].given}: train.bin and val.bin keep their own split; prepare them alone"
        )
    return sources


def is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ROW_SUFFIXES)


def _expand(given: str, left_out: Counter[str]) -> list[Source]:
    if given.startswith(HUB_PREFIX):
        return [Source(given, None, True)]
    if given.startswith(BUILTIN_PREFIX):
        if given.removeprefix(BUILTIN_PREFIX) not in BUILTINS:
            known = ", ".join(BUILTIN_PREFIX + name for name in BUILTINS)
            raise DataError(f"{given}: no such built-in corpus; known: {known}")
        return [Source(given, None, True)]
    if is_url(given):
        return _remote(given, left_out)
    path = Path(given)
    with readable(path):
        if path.is_dir():
            return _folder(given, path, left_out)
        if path.exists():
            listed = _listed(given, _regular(path))
            return listed or [_file(given, path, named=True)]
    if glob.has_magic(given):
        return [_file(given, file, named=False) for file in _glob(given)]
    raise DataError(f"{given}: no such file or folder; check the path")


def _remote(url: str, left_out: Counter[str]) -> list[Source]:
    """The files at a URL: one file, the files that a pattern matches, or those below a folder."""
    if url.startswith("file://"):
        return [replace(source, given=url) for source in _expand(url[len("file://") :], left_out)]
    with readable(Path(url)):
        files, is_one = remote_files(url)
    is_glob = glob.has_magic(url)
    chosen = []
    for file in files:
        below = file.url.removeprefix(url.rstrip("/")).split("/")
        if not (is_one or is_glob) and any(part.startswith(".") for part in below):
            left_out[HIDDEN] += 1
        elif is_one or is_glob or _is_text_file(cast(Path, file)):
            # A RemoteFile has all the methods of Path that readers call.
            path = cast(Path, file)
            chosen += _listed(url, path) or [_file(url, path, named=is_one)]
        else:
            left_out[OTHER] += 1
    if not chosen:
        raise DataError(f"{url}: no file of text here; name a file, or use a pattern")
    return chosen


def _folder(given: str, folder: Path, left_out: Counter[str]) -> list[Source]:
    """train.bin and val.bin if the folder has both (nanoGPT), or the text files below it."""
    pair = [Source(given, folder / file, True, split) for split, file in SPLIT_FILES.items()]
    if all(source.path and source.path.is_file() for source in pair):
        return pair
    found = []
    for path in _files_below(folder, left_out):
        if _is_text_file(path):
            found.append(path)
        else:
            left_out[OTHER] += 1
    if not found:
        wanted = " ".join("*" + suffix for suffix in (*TEXT_NAMES, *ROW_NAMES, ".parquet"))
        hidden = f" ({left_out[HIDDEN]} hidden left out)" if left_out[HIDDEN] else ""
        raise DataError(f"{folder}: holds no {wanted}{hidden}; name other files or use a glob")
    return [_file(given, file, named=False) for file in sorted(found)]


def _file(given: str, path: Path, *, named: bool) -> Source:
    return Source(given, path, named, is_archive=_is_archive(path))


def _is_archive(path: Path) -> bool:
    """Whether a file is a .tar: by its name, or a packed file without a known name by its content.

    The .xz files of OpenWebText are archives of texts.
    """
    name = path.name.lower()
    if name.endswith(ARCHIVE_SUFFIXES):
        return True
    if not name.endswith(PACKED) or name.endswith((*TEXT_SUFFIXES, *ROW_SUFFIXES)):
        return False
    with open_lines(path, no_tap) as stream:
        return is_archive(stream.read(HEADER_BYTES))


def _listed(given: str, path: Path) -> list[Source]:
    """The .tfrecords files that an .index file lists, one a line; [] for any other file."""
    if path.suffix.lower() != ".index":
        return []
    with readable(path):
        if path.stat().st_size > MAX_INDEX_BYTES:
            return []
        with path.open("rb") as file:
            lines = file.read().decode(errors="replace").splitlines()
    named = [(n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
    if not named or not named[0][1].lower().endswith(TFRECORDS_SUFFIXES):
        return []
    return [Source(given, _indexed(path, n, name), True) for n, name in named]


def _indexed(index: Path, number: int, name: str) -> Path:
    """A file of an index: a URL, or a path from the working directory, or else from the index's."""
    where = f"{index}:{number}: {name[:200]}"
    if not name.lower().endswith(TFRECORDS_SUFFIXES):
        raise DataError(f"{where}: not a {' or '.join(TFRECORDS_SUFFIXES)} file; correct the list")
    if is_url(name):
        with readable(Path(name)):
            files, is_one = remote_files(name)
        if not is_one:
            raise DataError(f"{where}: is no file; correct the list")
        return cast(Path, files[0])
    folders = [Path(), *list(index.parents)[:1]]  # an index at a URL has no folder here
    for path in (folder / name for folder in folders):
        with readable(path):
            if path.is_file():
                return path
    raise DataError(f"{where}: no such file; paths are relative to the working directory")


def _files_below(folder: Path, left_out: Counter[str], *, hidden: bool = False) -> Iterator[Path]:
    """The files below a folder, also in linked folders; each folder is entered once."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        # Links come after the real folders: a folder that is reached both ways keeps its real path.
        for where, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            if _identity(where) in entered:
                left_out[LINKED] += 1
                folders.clear()
                continue
            entered.add(_identity(where))
            if not hidden:
                left_out[HIDDEN] += sum(name.startswith(".") for name in (*folders, *names))
                folders[:] = [name for name in folders if not name.startswith(".")]
            folders.sort()
            waiting += [p for p in (Path(where, name) for name in folders) if p.is_symlink()]
            shown = (name for name in names if hidden or not name.startswith("."))
            yield from (Path(where, name) for name in sorted(shown))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_text_file(path: Path) -> bool:
    """Whether to read a file of a folder: a .json file only if its first line is an object."""
    if not (path.name.lower().endswith(FOLDER_SUFFIXES) and path.is_file()):
        return False
    if not path.name.lower().endswith(".json"):
        return True
    with readable(path), path.open("rb") as file:
        lines = iter(lambda: file.readline(SNIFFED_BYTES), b"")
        line = next((line for line in lines if line.strip()), b"")
    if len(line) == SNIFFED_BYTES:  # a cut line cannot be parsed
        return line.lstrip().startswith(b"{")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _glob(pattern: str) -> list[Path]:
    """The files that a pattern matches; unlike glob's, `**` enters no folder twice (link loops)."""
    parts = Path(pattern).parts
    if "**" in parts:
        first = parts.index("**")
        head = str(Path(*parts[:first])) if first else "."
        tail = parts[first:]
        hidden = any(part.startswith(".") for part in tail)
        found = [
            file if first else file.relative_to(".")
            for base in (glob.glob(head) if glob.has_magic(head) else [head])
            if Path(base).is_dir()
            for file in _files_below(Path(base), Counter(), hidden=hidden)
            if _matches(file.relative_to(base).parts, tail)
        ]
    else:
        found = [Path(name) for name in glob.glob(pattern)]
    found = sorted({path for path in found if path.is_file()})
    if not found:
        raise DataError(f"{pattern}: matches no file; check the pattern (and quote it)")
    return found


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's parts match a pattern's; `**` matches any number of parts."""
    # Tracks all positions in the pattern at once, like a nondeterministic automaton: backtracking
    # is very slow for patterns with several `**`.
    reached = {0}
    for name in (*names, None):
        for i in range(len(pattern)):
            if i in reached and pattern[i] == "**":
                reached.add(i + 1)
        if name is None:
            return len(pattern) in reached
        after = set()
        for i in reached - {len(pattern)}:
            shown = not name.startswith(".") or pattern[i].startswith(".")
            if pattern[i] == "**" and shown:
                after.add(i)
            elif shown and fnmatchcase(name, pattern[i]):
                after.add(i + 1)
        reached = after
    return False


def _regular(path: Path) -> Path:
    # A device may have no end, and a pipe can block forever or be read only once.
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file; save it as a file first")
    return path
