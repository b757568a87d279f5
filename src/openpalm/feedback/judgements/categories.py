"""A payload as one of a few values, so that agreement can be counted in the database.

compare  -3 ... -1: candidate 0 is better, by strength; 0: tie; 1 ... 3: candidate 1 is better
thumb    0 or 1
rate     the value, if there is one axis
"""

from typing import Any

BOTH_BAD = 9


def category_of(kind: str, payload: dict[str, Any]) -> int | None:
    """None if the payload is not one value."""
    match kind, payload:
        case "compare", {"better": better, "strength": strength}:
            return strength if better == 1 else -strength
        case "compare", {"tie": _}:
            return 0
        case "compare", {"both_bad": _}:
            return BOTH_BAD
        case "thumb", {"up": up}:
            return int(up)
        case "rate", {"ratings": ratings} if len(ratings) == 1:
            return next(iter(ratings.values()))
    return None


def picked_position(kind: str, payload: dict[str, Any]) -> int | None:
    """The position of the preferred candidate, for position bias; None without a preference."""
    match kind, payload:
        case "compare", {"better": better}:
            return better
        case "rank", {"order": [[first], *_]}:
            return first
    return None
