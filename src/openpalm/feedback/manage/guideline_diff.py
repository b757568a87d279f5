"""The lines that change from one version of the guidelines to the next."""

import difflib
from collections.abc import Iterator
from itertools import islice

MAX_LINES = 3000
"""of a version; comparing takes quadratic time"""


def changes(old: str, new: str) -> Iterator[tuple[str, str]]:
    """(mark, line) of each line that is the same (" "), added ("+") or removed ("-")."""
    before, after = old.splitlines(), new.splitlines()
    if max(len(before), len(after)) > MAX_LINES:
        return
    compared = difflib.unified_diff(before, after, lineterm="", n=MAX_LINES)
    for line in islice(compared, 3, None):  # two lines of names, one of line numbers
        yield line[0], line[1:]
