"""Values from outside (files, requests) made safe for messages: short, one line, printable."""

import itertools
from collections.abc import Iterable


def shown(value: object) -> str:
    """A value from outside for a message: one short line, unprintable characters escaped."""
    text = value if isinstance(value, str) else type(value).__name__
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def names(row: Iterable[str]) -> str:
    """The field names of a row for a message: the first eight."""
    names = [shown(name) for name in itertools.islice(row, 9)]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "no field at all"
