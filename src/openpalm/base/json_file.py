"""Reads a JSON object from an untrusted file, with bounds and clear errors."""

import errno
import json
from pathlib import Path
from typing import Any

from openpalm.errors import CheckpointError, StorageError

MAX_BYTES = 64 << 20
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def read_json(path: Path, remedy: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object. Raises CheckpointError; `remedy` is the advice where the file is missing.

    Raises StorageError where the system fails to read it.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path}: too large for what it should hold")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {remedy}") from None
    except OSError as error:
        raise read_failure(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def read_failure(path: Path, error: OSError) -> CheckpointError | StorageError:
    """The error to raise for a file that could not be read.

    A missing file is damage, and an older checkpoint may replace it. An I/O error, a missing
    permission or too many open files say nothing about the content: the work stops.
    """
    reason = error.strerror or str(error)
    if error.errno in _ABSENT:
        return CheckpointError(f"{path}: cannot be read ({reason})")
    return StorageError(f"{path}: cannot be read ({reason}); nothing was changed, try again")
