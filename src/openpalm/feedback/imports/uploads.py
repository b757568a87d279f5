"""Uploaded files: checked, streamed to disk under a random name, read by the import job."""

import secrets
from pathlib import Path

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile

from openpalm.base.files import flush
from openpalm.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".txt")
MAX_NAME = 120


def folder() -> Path:
    return settings.FEEDBACK_DIR / "uploads"


def store(file: UploadedFile) -> tuple[str, str]:
    """Returns (name in the folder of uploads, name that the person gave it). Raises DataError."""
    given = given_name(file)
    suffix = next((s for s in reversed(SUFFIXES) if given.lower().endswith(s)), None)
    if suffix is None:
        raise DataError(f"{given}: must be one of {', '.join(SUFFIXES)}")
    limit = settings.FEEDBACK_MAX_UPLOAD_BYTES
    if (file.size or 0) > limit:
        raise DataError(f"{given}: has {file.size:,} bytes; at most {limit:,} are taken")
    if not file.size:
        raise DataError(f"{given}: is empty")
    folder().mkdir(parents=True, exist_ok=True)
    # Nothing of the given name: it could contain a path, or be too long for the file system.
    name = secrets.token_hex(16) + suffix
    path = folder() / name
    try:
        with path.open("xb") as target:
            for chunk in file.chunks():
                target.write(chunk)
            flush(target)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return name, given


def given_name(file: UploadedFile) -> str:
    """The name without folders and without characters that would break a line of a message."""
    name = "".join(c for c in Path(file.name or "file").name if c.isprintable())
    return name[-MAX_NAME:] or "file"


def path_of(name: str) -> Path:
    """The path of a stored upload. Raises DataError for a name that `store` did not make."""
    if "/" in name or "\\" in name or name.startswith("."):
        raise DataError(f"{name!a:.80}: is not an upload")
    return folder() / name
