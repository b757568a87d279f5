"""Reads a JSON object from a file that anybody may have written."""

import json
from pathlib import Path
from typing import Any

from openpalm.errors import CheckpointError

MAX_BYTES = 64 << 20


def read_json(path: Path, remedy: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object. Raises CheckpointError; `remedy` says what to do where the file is missing."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path}: too large for what it should hold")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
