"""The payload of each kind of preference record, and its check."""

from itertools import chain
from typing import Any, Literal

Kind = Literal["compare", "rank", "rate", "thumb", "edit", "write", "flag"]

PAYLOADS: dict[Kind, str] = {
    "compare": '{"better": i, "worse": j, "strength": 1 to 3}, {"tie": [i, j]} or '
    '{"both_bad": [i, j]}',
    "rank": '{"order": [[best ...], ..., [worst ...]]} with each of two or more candidates once',
    "rate": '{"ratings": {axis: 1 to 5}, "candidate": i}',
    "thumb": '{"up": true or false, "candidate": i}',
    "edit": '{"candidate": i, "text": the better completion}',
    "write": '{"text": a demonstration}',
    "flag": '{"candidate": i or null, "reason": a text}',
}


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_payload(kind: Kind, payload: dict[str, Any], n: int) -> bool:
    """Whether `payload` has the form of this kind, for `n` candidates."""

    def every(*numbers: Any) -> bool:
        """Whether these are distinct numbers of candidates."""
        right = all(type(i) is int and 0 <= i < n for i in numbers)
        return right and len(set(numbers)) == len(numbers)

    match kind, payload, len(payload):
        case "compare", {"better": i, "worse": j, "strength": int(strength)}, 3:
            return every(i, j) and strength is not True and 1 <= strength <= 3
        case "compare", {"tie": [i, j]} | {"both_bad": [i, j]}, 1:
            return every(i, j)
        case "rank", {"order": [[_, *_], *_] as order}, 1:
            groups = all(isinstance(group, list) and group for group in order)
            return groups and every(*chain(*order)) and sum(map(len, order)) == n > 1
        case "rate", {"ratings": dict(axes), "candidate": i}, 2:
            whole = all(type(value) is int and 1 <= value <= 5 for value in axes.values())
            return every(i) and bool(axes) and all(map(is_text, axes)) and whole
        case "thumb", {"up": bool(), "candidate": i}, 2:
            return every(i)
        case "edit", {"candidate": i, "text": text}, 2:
            return every(i) and is_text(text)
        case "write", {"text": text}, 1:
            return is_text(text)
        case "flag", {"candidate": i, "reason": reason}, 2:
            return (i is None or every(i)) and is_text(reason)
    return False
