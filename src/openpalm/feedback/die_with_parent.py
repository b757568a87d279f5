"""Ends a child process when its parent is killed (on Linux)."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec as little as possible may run.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """As `preexec_fn`: the process gets SIGTERM when the thread that started it ends."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
