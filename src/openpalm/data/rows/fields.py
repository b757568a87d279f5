"""Names of row fields by role, and `Row`, which records the fields that a reader used.

Every reader takes fields through `Row`. An unread field of a prompt or a completion is an error if
its text is not in the example, since ignoring it would change what the model learns. Every other
unread field is counted and named in the report.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from openpalm.base.console import shown
from openpalm.data.rows.read_result import UnusableRow
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
RATINGS = ("rating", "label", "score")
MARGINS = ("margin",)
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)
"""Scores of both completions of a pair; their difference is the margin."""
WEIGHTS = ("weight", "train", "loss_weight")
TOOLS = ("tools", "functions", "tool_calls", "function_call")
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")

PROMPT_FIELDS = frozenset((*PROMPTS, *INPUTS, *HISTORY, *SYSTEMS, *MESSAGES, *TOOLS, *MEDIA))
"""Fields that the model reads before its completion."""
COMPLETION_FIELDS = frozenset((*COMPLETIONS, *SOLUTIONS, *RESPONSES, *SIDES, *THOUGHTS))
"""Fields that the model learns to generate."""


class Row:
    """The fields of one row of a file; records which of them were read.

    `given` is the row as written in the file, if `values` were translated from it.
    """

    def __init__(self, values: Mapping[str, Any], given: Mapping[str, Any] | None = None):
        self.values = dict(values)
        self.given = dict(values if given is None else given)
        self.used: set[str] = set()
        self.unused_nested: dict[str, None] = {}
        """unused fields of nested objects, as "messages[].name", in order"""

    def get(self, name: str) -> Any:
        self.used.add(name)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether the field is present; null counts as absent."""
        return self.values.get(name) is not None

    def find_name(self, names: Iterable[str]) -> str:
        """The spelling of a field that this row uses; the first of `names` if it has none.

        Raises DataError if two spellings are present with different values.
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

    def note_unused(self, where: str, nested: Mapping[str, Any], used: Iterable[str]) -> None:
        """Notes the fields of a nested object that are not in `used`."""
        for name in nested.keys() - {*used}:
            if not is_blank(nested[name]):
                self.unused_nested[f"{where}.{name}"] = None

    def check_weight(self) -> None:
        """Raises UnusableRow for a row of weight 0, DataError for a weight other than 0 and 1."""
        for name in WEIGHTS:
            if self.has(name) and not read_weight(self.get(name), f'field "{name}"'):
                raise UnusableRow(f"{name} is 0")

    def unused_fields(self, texts: Iterable[str], roles: frozenset[str]) -> list[str]:
        """The names of the fields that were not read, if ignoring them is harmless.

        `texts` are all texts of the example. Raises DataError if an unread field in `roles` holds
        a text that the example does not have: ignoring it would change what the model learns.
        """
        known = {text.strip() for text in texts}
        unread = [n for n, v in self.values.items() if n not in self.used and not is_blank(v)]
        for name in unread:
            if name in roles and not _is_among(self.values[name], known):
                read = ", ".join(sorted(self.used & self.values.keys())) or "the other fields"
                raise DataError(
                    f"field {shown(name)} would not reach the model, which is given {read}; "
                    "write it into one of these fields, or leave it out"
                )
        return [*unread, *sorted(self.unused_nested)]


def read_weight(value: object, field: str) -> bool:
    """Whether the loss is on a row or turn: a `weight` of 0 or 1, a `train` of true or false."""
    if value in (0, 1):
        return bool(value)
    raise DataError(f"{field} is {value!r:.60}; it must be 0 or 1, for the loss has no other")


def is_blank(value: object) -> bool:
    """Whether a field is null, white space or empty."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _is_among(value: object, texts: set[str]) -> bool:
    """Whether a text or a number, or the content of every turn of a list, is in `texts`."""
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
