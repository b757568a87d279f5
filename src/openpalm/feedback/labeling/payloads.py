"""A submitted form -> the payload of a preference record."""

from collections.abc import Mapping
from typing import Any

from openpalm.errors import DataError
from openpalm.feedback.models import Assignment, Project, Task

Form = Mapping[str, Any]


def payload_of(assignment: Assignment, form: Form) -> tuple[str, dict[str, Any]]:
    """Kind and payload. Raises DataError, in words for the labeler, if the form is not complete."""
    task = assignment.project.task
    if task == Task.PAIR:
        return "compare", pair_payload(assignment.project, assignment.order, form)
    raise DataError(f"items of the task {task} cannot be judged here")


def pair_payload(project: Project, order: list[int], form: Form) -> dict[str, Any]:
    """`choice` is the step from the left, 1 to the scale, or tie or both_bad."""
    left, right = order
    choice = form.get("choice", "")
    middle = (project.scale + 1) // 2
    if choice == "both_bad":
        return {"both_bad": [0, 1]}
    if choice in ("tie", str(middle)):
        return {"tie": [0, 1]}
    if choice not in {str(step) for step in range(1, project.scale + 1)}:
        raise DataError("choose how much better one answer is, tie, or both bad")
    step = int(choice) - middle
    better, worse = (left, right) if step < 0 else (right, left)
    return {"better": better, "worse": worse, "strength": abs(step)}
