"""The manifest of a checkpoint: sizes and SHA-256 hashes of its files, its own hash, lineage.

It is written last, so a directory with a manifest is complete. A file is used only if the manifest
lists it and its hash agrees.
"""

import hashlib
import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from openpalm import __version__
from openpalm.base.files import sha256_of
from openpalm.base.json_file import read_failure, read_json
from openpalm.errors import CheckpointError

FORMAT = "openpalm-checkpoint"
VERSION = 1
WEIGHTS = "model.safetensors"
REMEDY = "take an older checkpoint or another copy"
_NAME = re.compile(r"[\w.-]{1,255}(/[\w.-]{1,255})*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(directory: Path, lineage: dict[str, Any]) -> None:
    """Writes manifest.json for all files of the directory."""
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        file.chmod(0o644)  # safetensors writes files for the owner only
        name = file.relative_to(directory).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    versions = {"openpalm": __version__, "torch": torch.__version__}
    body = {"format": FORMAT, "version": VERSION, "files": files}
    body |= {"lineage": lineage, "versions": versions}
    (directory / "manifest.json").write_text(manifest_text(body), encoding="utf-8")


def manifest_text(body: dict[str, Any]) -> str:
    """The exact text of a manifest: its body with the hash of the body."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=1) + "\n"


def verify(directory: Path, *, training: bool = True) -> dict[str, Any]:
    """Checks the size and hash of every file against the manifest, and returns the manifest.

    With training=False the files in train/ are not hashed. A missing train/ is allowed: that is a
    published model. A file is hashed once per process unless it changes. Raises CheckpointError
    naming the damaged file, StorageError if the system cannot read one.
    """
    manifest = read_manifest(directory)
    files = manifest["files"]
    if file_size(directory / "train") is None:
        files = {name: entry for name, entry in files.items() if not name.startswith("train/")}
    for name, entry in files.items():
        size = file_size(directory / name, regular=True)
        if size is None:
            raise CheckpointError(f"{directory}: {name} is missing; {REMEDY}")
        if size != entry["bytes"]:
            raise CheckpointError(f"{directory}: {name} is torn ({size} bytes); {REMEDY}")
    names = [name for name in files if training or not name.startswith("train/")]

    def hashed(name: str) -> str:
        try:
            return sha256_of(directory / name)
        except OSError as error:
            raise read_failure(directory / name, error) from None

    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        hashes = list(pool.map(hashed, names))
    for name, found in zip(names, hashes, strict=True):
        if found != files[name]["sha256"]:
            raise CheckpointError(f"{directory}: {name} was altered since it was written; {REMEDY}")
    return manifest


def file_size(path: Path, *, regular: bool = False) -> int | None:
    """Size in bytes; None if the path does not exist or, with `regular`, is not a regular file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return None
    except OSError as error:
        raise read_failure(path, error) from None
    return found.st_size if stat.S_ISREG(found.st_mode) or not regular else None


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads the manifest and checks its own hash; the other files are not checked."""
    where = directory / "manifest.json"
    manifest = read_json(where, REMEDY)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise CheckpointError(f"{where}: not of a checkpoint that this version reads; check PATH")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    # Compares the whole text, so that changed white space counts as damage too.
    if where.read_bytes() != manifest_text(body).encode():
        raise CheckpointError(f"{where}: was altered since it was written; {REMEDY}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        raise CheckpointError(f"{where}: its list of files is not one this project writes")
    if missing := {"config.json", WEIGHTS} - files.keys():
        raise CheckpointError(f"{where}: does not list {min(missing)}; {REMEDY}")
    return manifest


def _is_entry(name: str, entry: object) -> bool:
    """Whether `write_manifest` could have written this entry.

    The name must stay inside the directory, without `..` or `//`, and the entry needs a size and a
    hash.
    """
    inside = _NAME.fullmatch(name) and {".", ".."}.isdisjoint(name.split("/"))
    if not inside or not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
        return False
    return _SHA256.fullmatch(str(entry.get("sha256"))) is not None


def is_listed(directory: Path, name: str) -> bool:
    """Whether the manifest lists the file; files that it does not list are not used."""
    return name in read_manifest(directory)["files"]
