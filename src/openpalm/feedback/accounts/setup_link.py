"""The secret in the sign-up link of the first administrator, who has no default password."""

import hashlib
import hmac
from pathlib import Path

from openpalm.feedback.secret_key import read_or_make


def setup_token(folder: Path) -> str:
    """The same in every process that shares the folder; derived from the secret key."""
    key = read_or_make(folder).encode()
    return hmac.new(key, b"first administrator", hashlib.sha256).hexdigest()[:32]
