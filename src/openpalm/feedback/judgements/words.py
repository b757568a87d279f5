"""Judgements in words, and texts split into prose and blocks of code."""

import re
from typing import Any

from openpalm.feedback.judgements.payloads import middle
from openpalm.feedback.models import Assignment, Project, Response, User

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
AUTHORS: dict[str, str] = {
    User.Kind.PERSON: "people",
    User.Kind.SIMULATED: "simulated labelers",
    User.Kind.MODEL: "models as judges",
}
MAX_SHOWN = 300
STRENGTHS = {5: {1: "", 2: "much "}, 7: {1: "slightly ", 2: "", 3: "much "}}
_FENCE = re.compile(r"(^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\Z))", re.MULTILINE | re.DOTALL)


def pieces(text: str) -> list[tuple[bool, str]]:
    """(whether it is a fenced block of code, text), in the order of the text.

    A blank line next to a block is left out: pages show it as the block's margin.
    """
    parts = _FENCE.split(text)
    for index in range(1, len(parts), 2):
        parts[index - 1] = re.sub(r"\n{1,2}\Z", "", parts[index - 1])
        parts[index + 1] = re.sub(r"\A\n{1,2}", "", parts[index + 1])
    return [(index % 2 == 1, part) for index, part in enumerate(parts) if part]


def step_label(project: Project, step: int) -> str:
    """The label of a step of the scale, such as "A much better"."""
    distance = step - middle(project)
    if distance == 0:
        return "Tie"
    letter = "A" if distance < 0 else "B"
    return f"{letter} {STRENGTHS[project.scale].get(abs(distance), '')}better"


def describe_as_shown(response: Response, assignment: Assignment) -> str:
    """The judgement as its labeler saw it: answers have the names of the screen."""
    match response.state:
        case Response.State.SKIPPED:
            return "Skipped"
        case Response.State.FLAGGED:
            return f"Flagged: {response.reason}"
        case Response.State.DELETED:
            return ""
    return _payload_as_shown(response.kind, response.payload, assignment)


def _payload_as_shown(kind: str, payload: dict[str, Any], assignment: Assignment) -> str:
    place = {position: place for place, position in enumerate(assignment.order)}
    match kind, payload:
        case "compare", {"better": better, "strength": strength}:
            step = -strength if place[better] == 0 else strength
            return step_label(assignment.project, middle(assignment.project) + step)
        case "compare", {"tie": _}:
            return "Tie"
        case "compare", {"both_bad": _}:
            return "Both bad"
        case "rank", {"order": groups}:
            shown = [sorted(place[position] + 1 for position in group) for group in groups]
            return " > ".join(" = ".join(map(str, group)) for group in shown)
        case "rate", {"ratings": ratings}:
            return ", ".join(f"{axis} {value}" for axis, value in ratings.items())
        case "thumb", {"up": up}:
            return "Good" if up else "Bad"
        case "edit", _:
            return "Edited"
        case "write", _:
            return "Written"
    return ""


def describe(response: Response) -> str:
    """The judgement for managers, such as "B better than A (2)": answers in the item's own order.

    A long text is cut.
    """
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
