"""What a corpus is made of."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text; `source` says where it came from ("path", "path:line"), for messages."""

    text: str
    source: str
