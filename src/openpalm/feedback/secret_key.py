"""The secret key of the site: made once, readable by its owner only."""

import os
import secrets
from pathlib import Path


def read_or_make(folder: Path) -> str:
    """The key in `folder`/secret_key; two processes that start together agree on one."""
    path = folder / "secret_key"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        made = path.with_name(f"secret_key.{os.getpid()}")
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(64))
        try:
            os.link(made, path)  # unlike rename, this fails if another process was first
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_text(encoding="ascii")
