"""A judgement in words for managers, with the answers lettered in the item's own order."""

from typing import Any

from openpalm.feedback.labeling.words import LETTERS
from openpalm.feedback.models import Response

MAX_SHOWN = 300


def describe(response: Response) -> str:
    """Such as "B better than A (2)"; of texts the beginning."""
    if response.state == Response.State.SKIPPED:
        return f"skipped: {response.reason}" if response.reason else "skipped"
    if response.state == Response.State.DELETED:
        return "deleted"
    return describe_payload(response.kind, response.payload)


def describe_payload(kind: str, payload: dict[str, Any]) -> str:
    match kind, payload:
        case "compare", {"better": better, "worse": worse, "strength": strength}:
            return f"{LETTERS[better]} better than {LETTERS[worse]} ({strength})"
        case "compare", {"tie": _}:
            return "tie"
        case "compare", {"both_bad": _}:
            return "both bad"
        case "rank", {"order": groups}:
            named = [" = ".join(LETTERS[i] for i in sorted(group)) for group in groups]
            return " > ".join(named)
        case "rate", {"ratings": ratings}:
            return ", ".join(f"{axis} {value}" for axis, value in ratings.items())
        case "thumb", {"up": up}:
            return "good" if up else "bad"
        case (("edit" | "write"), {"text": text}):
            return f"{'edited' if kind == 'edit' else 'written'}: {_beginning(text)}"
        case "flag", {"reason": reason}:
            return f"flagged: {_beginning(reason)}"
    return kind


def _beginning(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} …"
