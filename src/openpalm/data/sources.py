"""What the user named as input, as a list of things to read: files, folders, globs, Hub datasets.

Checks that everything exists and reads none of it.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from openpalm.data.builtin import BUILTINS
from openpalm.data.streams import readable
from openpalm.errors import DataError

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".rst", *ROW_SUFFIXES, ".parquet")
BUILTIN_PREFIX = "builtin:"
HUB_PREFIX = "hub:"
SPLIT_FILES = {"train": "train.bin", "val": "val.bin"}


@dataclass(frozen=True, slots=True)
class Source:
    """One thing to read: a file, or a built-in corpus or Hub dataset where `path` is None.

    `given` is the input as the user wrote it; `named` says that it was this very file, so that
    its being empty is a mistake and not a detail of a folder. `split` is the source's own, where
    it comes with one.
    """

    given: str
    path: Path | None
    named: bool
    split: str | None = None

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
    def is_one(self) -> bool:
        """Whether it is one document, of any length, read in pieces."""
        return self.path is not None and not (self.is_rows or self.is_table)


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Expands folders and globs, and checks that everything exists, without reading it."""
    if not inputs:
        raise DataError("no input; name a file, a folder, a glob or builtin:python-docs")
    sources = [source for given in inputs for source in _expand(given)]
    split = [source for source in sources if source.split]
    if split and len(split) < len(sources):
        raise DataError(
            f"{split[0].given}: train.bin and val.bin keep their own split; prepare them alone"
        )
    return sources


def is_rows(path: Path) -> bool:
    return path.name.lower().endswith(ROW_SUFFIXES)


def _expand(given: str) -> list[Source]:
    if given.startswith(HUB_PREFIX):
        return [Source(given, None, True)]
    if given.startswith(BUILTIN_PREFIX):
        if given.removeprefix(BUILTIN_PREFIX) not in BUILTINS:
            known = ", ".join(BUILTIN_PREFIX + name for name in BUILTINS)
            raise DataError(f"{given}: no such built-in corpus; known: {known}")
        return [Source(given, None, True)]
    path = Path(given)
    with readable(path):
        if path.is_dir():
            return _folder(given, path)
        if path.exists():
            return [Source(given, _regular(path), True)]
    if glob.has_magic(given):
        return [Source(given, file, False) for file in _glob(given)]
    raise DataError(f"{given}: no such file or folder; check the path")


def _folder(given: str, folder: Path) -> list[Source]:
    """The two token files of a folder that has both, or the text files below it by path."""
    pair = [Source(given, folder / file, True, split) for split, file in SPLIT_FILES.items()]
    if all(source.path and source.path.is_file() for source in pair):
        return pair

    def refuse(error: OSError) -> NoReturn:
        raise error

    walk = os.walk(folder, onerror=refuse)
    files = (Path(where, name) for where, _, names in walk for name in names)
    found = sorted(p for p in files if p.name.lower().endswith(FOLDER_SUFFIXES) and p.is_file())
    if not found:
        wanted = " ".join("*" + suffix for suffix in FOLDER_SUFFIXES)
        raise DataError(f"{folder}: holds no {wanted}; name other files or use a glob")
    return [Source(given, file, False) for file in found]


def _glob(pattern: str) -> list[Path]:
    found = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not found:
        raise DataError(f"{pattern}: matches no file; check the pattern (and quote it)")
    return found


def _regular(path: Path) -> Path:
    # A device or a pipe has no end, or never a beginning.
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file; save it as a file first")
    return path
