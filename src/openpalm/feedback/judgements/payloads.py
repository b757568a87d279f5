"""A submitted form -> the payload of a preference record, and back for drafts and changes.

Forms number the answers by their place on the screen, from 0; payloads by their position in the
item. So the page does not reveal which model is at which position.
"""

from collections.abc import Callable, Mapping
from typing import Any

from openpalm.data.rows.payloads import PAYLOADS, Kind, is_payload
from openpalm.errors import DataError
from openpalm.feedback.models import Assignment, Project, Task

Form = Mapping[str, Any]
Judged = tuple[str, dict[str, Any]]
"""kind and payload"""


def payload_of(assignment: Assignment, form: Form) -> Judged:
    """Kind and payload. Raises DataError, in words for the labeler, if the form is not complete."""
    return _READERS[assignment.project.task](assignment, form)


def form_of(assignment: Assignment, kind: str, payload: dict[str, Any]) -> dict[str, str]:
    """The form that gives this payload; empty for skips and flags."""
    place = {position: place for place, position in enumerate(assignment.order)}
    match kind, payload:
        case "compare", {"both_bad": _}:
            return {"choice": "both_bad"}
        case "compare", {"tie": _}:
            return {"choice": str(middle(assignment.project))}
        case "compare", {"better": better, "strength": strength}:
            step = -strength if place[better] == 0 else strength
            return {"choice": str(middle(assignment.project) + step)}
        case "rank", {"order": groups}:
            return {
                f"place_{place[position]}": str(rank)
                for rank, group in enumerate(groups, 1)
                for position in group
            }
        case "rate", {"ratings": ratings}:
            names = axes(assignment.project)
            return {f"axis_{names.index(a)}": str(v) for a, v in ratings.items() if a in names}
        case "thumb", {"up": up} if assignment.project.task == Task.EDIT and up:
            return {"unchanged": "on"}
        case "thumb", {"up": up}:
            return {"choice": "up" if up else "down"}
        case (("edit" | "write"), {"text": text}):
            return {"text": text}
    return {}


def wrong_payload(project: Project, kind: Kind, payload: dict[str, Any], count: int) -> str:
    """What is wrong with a payload for an item of `count` candidates; empty if nothing is."""
    if not is_payload(kind, payload, count):
        return f"must be {PAYLOADS[kind]}"
    if kind == "compare" and payload.get("strength", 1) > project.scale // 2:
        return f"strength is at most {project.scale // 2} here"
    if kind == "rate" and set(payload["ratings"]) != set(axes(project)):
        return f"must rate the axes {', '.join(axes(project))}"
    return ""


def middle(project: Project) -> int:
    """The step of the scale that is a tie."""
    return (project.scale + 1) // 2


def axes(project: Project) -> list[str]:
    return list(project.axes) or ["quality"]


def pair_payload(project: Project, order: list[int], form: Form) -> dict[str, Any]:
    """`choice` is the step from the left, 1 to the scale, or tie or both_bad."""
    left, right = order
    choice = form.get("choice", "")
    if choice == "both_bad":
        return {"both_bad": [0, 1]}
    if choice in ("tie", str(middle(project))):
        return {"tie": [0, 1]}
    if choice not in {str(step) for step in range(1, project.scale + 1)}:
        raise DataError("choose how much better one answer is, tie, or both bad")
    step = int(choice) - middle(project)
    better, worse = (left, right) if step < 0 else (right, left)
    return {"better": better, "worse": worse, "strength": abs(step)}


def _pair(assignment: Assignment, form: Form) -> Judged:
    return "compare", pair_payload(assignment.project, assignment.order, form)


def _ranking(assignment: Assignment, form: Form) -> Judged:
    """`place_0` and so on: 1 is best, equal places are ties."""
    order = assignment.order
    given = [form.get(f"place_{index}", "") for index in range(len(order))]
    if "" in given:
        raise DataError(f"give answer {given.index('') + 1} a place, 1 for the best")
    allowed = {str(place) for place in range(1, len(order) + 1)}
    for index, place in enumerate(given, 1):
        if place not in allowed:
            raise DataError(f"the place of answer {index} must be 1 to {len(order)}")
    groups = [
        [position for position, at in zip(order, given, strict=True) if at == place]
        for place in sorted(set(given), key=int)
    ]
    return "rank", {"order": groups}


def _rating(assignment: Assignment, form: Form) -> Judged:
    """`axis_0` and so on, 1 to 5, in the order of the project's axes."""
    ratings: dict[str, int] = {}
    for index, axis in enumerate(axes(assignment.project)):
        value = form.get(f"axis_{index}", "")
        if value not in {"1", "2", "3", "4", "5"}:
            raise DataError(f"rate {axis} from 1 to 5")
        ratings[axis] = int(value)
    return "rate", {"ratings": ratings, "candidate": assignment.order[0]}


def _thumbs(assignment: Assignment, form: Form) -> Judged:
    choice = form.get("choice", "")
    if choice not in ("up", "down"):
        raise DataError("choose good or bad")
    return "thumb", {"up": choice == "up", "candidate": assignment.order[0]}


def _edit(assignment: Assignment, form: Form) -> Judged:
    """`text` is the better answer; `unchanged` says that the answer is good as it is."""
    position = assignment.order[0]
    if form.get("unchanged"):
        return "thumb", {"up": True, "candidate": position}
    text = _written(form)
    original = assignment.item.places.select_related("candidate").get(position=position)
    if text.strip() == _lines(original.candidate.text).strip():
        raise DataError('the text is unchanged; edit it, or choose "good as it is"')
    return "edit", {"candidate": position, "text": text}


def _demonstration(assignment: Assignment, form: Form) -> Judged:
    return "write", {"text": _written(form)}


def _written(form: Form) -> str:
    text = _lines(form.get("text", ""))
    if not text.strip():
        raise DataError("write an answer first")
    return text


def _lines(text: str) -> str:
    """Browsers send the ends of lines as CR LF."""
    return text.replace("\r\n", "\n")


_READERS: dict[str, Callable[[Assignment, Form], Judged]] = {
    Task.PAIR: _pair,
    Task.RANKING: _ranking,
    Task.RATING: _rating,
    Task.THUMBS: _thumbs,
    Task.EDIT: _edit,
    Task.DEMONSTRATION: _demonstration,
    Task.CHAT: _pair,
}
