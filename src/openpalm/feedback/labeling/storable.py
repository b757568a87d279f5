"""Texts that every database can store."""


def storable(text: str) -> str:
    """The text with U+FFFD for NUL and for half surrogate pairs, which PostgreSQL refuses.

    A model that works on bytes writes both now and then; a job must not fail over them.
    """
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\ufffd")
