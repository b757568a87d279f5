"""What each task of a project asks for: the kind of its payloads and how many candidates."""

from openpalm.data.rows.payloads import Kind
from openpalm.feedback.items.new_items import MOST_CANDIDATES
from openpalm.feedback.models import Task

KINDS: dict[str, Kind] = {
    Task.PAIR: "compare",
    Task.RANKING: "rank",
    Task.RATING: "rate",
    Task.THUMBS: "thumb",
    Task.EDIT: "edit",
    Task.DEMONSTRATION: "write",
    Task.CHAT: "compare",
}


def candidates_needed(task: str) -> tuple[int, int]:
    """Least and most candidates of an item."""
    match task:
        case Task.PAIR | Task.CHAT:
            return 2, 2
        case Task.RANKING:
            return 2, MOST_CANDIDATES
        case Task.DEMONSTRATION:
            return 0, 0
    return 1, 1
