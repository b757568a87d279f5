"""THE table of the fields of a row by their role, and a row that knows which of them were read.

Every reader takes fields through `Row`. A field with a role that nobody read, with a text that
stands nowhere in the example, is an error: leaving it out would change what is learnt. Every other
field that nobody read is counted and named.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from openpalm.base.console import shown
from openpalm.data.rows.read_result import UnusableRow
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

PROMPTS = ("prompt", "question", "problem", "instruction", "query")
INPUTS = ("input", "context")
HISTORY = ("history",)
SYSTEMS = ("system", "system_prompt")
MESSAGES = ("messages", "conversations")
COMPLETIONS = ("completion", "response", "output")
SOLUTIONS = ("answer", "solution")
RESPONSES = ("responses", "answers")
SIDES = ("chosen", "rejected")
RANKS = ("ranking", "rank")
RATINGS = ("rating", "label", "score")
MARGINS = ("margin",)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Numbers of both answers of a pair; the difference is the margin."""
WEIGHTS = ("weight", "train", "loss_weight")
TOOLS = ("tools", "functions", "tool_calls", "function_call")
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")

ASKED = frozenset((*PROMPTS, *INPUTS, *HISTORY, *SYSTEMS, *MESSAGES, *TOOLS, *MEDIA))
"""What the model would read before its answer."""
ANSWERED = frozenset((*COMPLETIONS, *SOLUTIONS, *RESPONSES, *SIDES, *THOUGHTS))
"""What the model would learn to say."""


class Row:
    """The fields of one row of a file. Reading one marks it as used.

    given: the row as it stands in the file, where `values` was made from it.
    """

    def __init__(self, values: Mapping[str, Any], given: Mapping[str, Any] | None = None):
        self.values = dict(values)
        self.given = dict(values if given is None else given)
        self.used: set[str] = set()
        self.unread: dict[str, None] = {}
        """nested fields that nobody read, as "messages[].name" """

    def get(self, name: str) -> Any:
        self.used.add(name)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is there; null is not."""
        return self.values.get(name) is not None

    def name(self, names: Iterable[str]) -> str:
        """Which of several spellings the row has; the first where it has none.

        Raises DataError where two of them say different things.
        """
        names = list(names)
        present = [name for name in names if not is_blank(self.values.get(name))]
        present = present or [name for name in names if self.has(name)]
        if not present:
            return names[0]
        first, *others = present
        for other in others:
            if self.values[other] != self.values[first]:
                raise DataError(
                    f'fields "{first}" and "{other}" have the same role; leave one of them out'
                )
            self.used.add(other)
        return first

    def note(self, where: str, nested: Mapping[str, Any], used: Iterable[str]) -> None:
        """Notes the fields of an object inside the row that are not used."""
        for name in nested.keys() - {*used}:
            if not is_blank(nested[name]):
                self.unread[f"{where}.{name}"] = None

    def check_weight(self) -> None:
        """UnusableRow for a row that carries no loss, DataError for a weight other than 1."""
        for name in WEIGHTS:
            if self.has(name) and not carries_loss(self.get(name), f'field "{name}"'):
                raise UnusableRow(f"{name} is 0")

    def leftover(self, texts: Iterable[str], roles: frozenset[str]) -> list[str]:
        """The names of the fields that were not read and change nothing.

        texts: all that the example says. Raises DataError for a field of one of the roles with a
        text that is not among them.
        """
        known = {text.strip() for text in texts}
        unread = [n for n, v in self.values.items() if n not in self.used and not is_blank(v)]
        for name in unread:
            if name in roles and not _stands(self.values[name], known):
                read = ", ".join(sorted(self.used & self.values.keys())) or "the others"
                raise DataError(
                    f"field {shown(name)} beside {read} would not reach the model; "
                    "write it into one of them, or leave it out"
                )
        return [*unread, *sorted(self.unread)]


def carries_loss(value: object, field: str) -> bool:
    """What a `weight` of 0 or 1, or a `train` of true or false, says."""
    if value in (0, 1):
        return bool(value)
    raise DataError(f"{field} is {value!r:.60}; it must be 0 or 1, for the loss has no other")


def is_blank(value: object) -> bool:
    """Whether a field says nothing."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def said(messages: Iterable[Message]) -> list[str]:
    return [message.content for message in messages]


def _stands(value: object, texts: set[str]) -> bool:
    """Whether a text, or every turn of a list, is among the texts."""
    if isinstance(value, str):
        return value.strip() in texts
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) in texts
    if not isinstance(value, list):
        return False
    contents = [
        turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn for turn in value
    ]
    return all(isinstance(text, str) and text.strip() in texts for text in contents)
