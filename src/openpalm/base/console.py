"""How values from outside appear in messages: one short, printable line."""

import itertools
from collections.abc import Iterable


def shown(value: object) -> str:
    """A value from outside as it may appear in a message: one short line, nothing unprintable."""
    text = value if isinstance(value, str) else type(value).__name__
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def names(row: Iterable[str]) -> str:
    """The fields of a row, as a message shows them."""
    names = [shown(name) for name in itertools.islice(row, 9)]
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "no field at all"
