"""Detects the format of the rows of a .jsonl file and converts each row to training examples.

Owns the names of the formats, and `RowReader`, the one loop over rows of every reader. All rows of
a file have one format; a row that cannot be read is refused with file, line and field.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from openpalm.base.console import shown
from openpalm.base.typed import at
from openpalm.data.corpus.json_lines import read_rows
from openpalm.data.corpus.sources import is_rows
from openpalm.data.rows.fields import (
    COMPLETION_FIELDS,
    COMPLETIONS,
    INPUTS,
    PROMPT_FIELDS,
    PROMPTS,
    RATINGS,
    RESPONSES,
    SIDES,
    SOLUTIONS,
    Row,
)
from openpalm.data.rows.messages import HH_TURN
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.public_datasets import PublicFormat, join_oasst_messages, public_format
from openpalm.data.rows.read_result import ReadResult, TiedRow, UnusableRow, collect_results
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

T = TypeVar("T")

PREFERENCE = "a Preference record"
EXPLICIT = "prompt, chosen, rejected"
HH = "Anthropic HH texts"
TEXTS = "whole texts"
WHOLE = "whole conversations"
RANKING = "prompt, responses, ranking"
SCORED = "prompt, responses, scores"
RATING = "prompt, response, rating"
LABELLED = "prompt, completion, label"
MESSAGES = "messages"
SHAREGPT = "ShareGPT conversations"
ALPACA = "instruction, input, output"
COMPLETION = "prompt, completion"
PROBLEM = "question, answer"
PROMPT = "a prompt alone"
TEXT = "a text"

OR_REMOVE = "(or remove this line)"
"""Ends the message of every line that cannot be read, for all verbs."""

PAIRS = (EXPLICIT, HH, TEXTS, WHOLE, RANKING, SCORED)

_VERBS = dict.fromkeys(PAIRS, "openpalm dpo") | {
    RATING: "openpalm reward",
    LABELLED: "openpalm dpo --loss kto",
    PROMPT: "openpalm grpo",
    TEXT: "openpalm data prepare",
}
"""The verb that reads a format, to suggest in messages; `openpalm sft` for all others."""


def _line(read: Callable[..., T], *given: Any) -> T:
    """Calls `read` for one line; its DataError says that the line may be removed."""
    try:
        return read(*given)
    except DataError as error:
        raise DataError(f"{error} {OR_REMOVE}") from None


def row_format(row: Mapping[str, Any]) -> str | None:
    """The name of a row's format, or None if it is unknown; a null field counts as absent.

    Rows carry extra fields, so the formats are tried from the most specific to the least: a row
    with prompt, completion and a boolean label is not merely prompt and completion.
    """
    has = {name for name, value in row.items() if value is not None}
    has_prompt = has & {*PROMPTS}
    prompted, completed = has_prompt or has & {*INPUTS}, has & {*COMPLETIONS}
    formats = [
        (PREFERENCE, {"kind", "payload"} <= has),
        (_pair_format(row), has & {*SIDES}),
        (RANKING, has & {*RESPONSES} and has & {"ranking", "rank"}),
        (SCORED, prompted and has & {*RESPONSES} and "scores" in has),
        # A boolean label is good or bad (KTO); a number is a rating.
        (LABELLED, prompted and completed and isinstance(row.get("label"), bool)),
        (RATING, prompted and completed and has & {*RATINGS, "ratings"}),
        (MESSAGES, "messages" in has),
        (SHAREGPT, "conversations" in has),
        (ALPACA, "instruction" in has and completed),
        (COMPLETION, prompted and completed),
        (PROBLEM, prompted and has & {*SOLUTIONS}),
        (PROMPT, has_prompt),
        (TEXT, "text" in has),
    ]
    return next((name for name, matches in formats if matches), None)


def _pair_format(row: Mapping[str, Any]) -> str:
    if any(row.get(name) is not None for name in (*PROMPTS, *INPUTS)):
        return EXPLICIT
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return HH if HH_TURN.match(row["chosen"]) else TEXTS
    return WHOLE


@dataclass(frozen=True, slots=True)
class RowReader(Generic[T]):
    """Reads a file of rows as examples of one type: pairs, ratings, prompts, conversations, ..."""

    what: str
    """names one example in messages"""
    converters: Mapping[str, Callable[[Row], Iterable[T | str]]]
    """for each format, row -> examples; a string is a reason to skip the row"""
    from_preferences: Callable[[list[Preference]], ReadResult[T]]
    """the same for a file of preference records"""
    keeps_row: bool = False
    """whether the example keeps the whole row, so that only fields of the prompt can be lost"""
    convert_tie: Callable[[Row], Iterable[T]] | None = None
    """row of two equally good completions -> examples; without it a tie is unused"""

    def read(self, path: str | Path) -> ReadResult[T]:
        """The examples of a .jsonl or .jsonl.gz file. Raises DataError with line and field."""
        path = Path(path)
        if not is_rows(path):
            raise DataError(f"{path}: {self.what}s are read from .jsonl or .jsonl.gz; convert it")
        preferences: list[tuple[str, Preference]] = []
        found: list[tuple[str, T | str]] = []
        unused: Counter[str] = Counter()
        first = None
        for where, given in join_oasst_messages(read_rows(path)):
            public = public_format(given)
            name = public.name if public else row_format(given)
            if public is None and (name is None or name not in (PREFERENCE, *self.converters)):
                raise self._refuse_row(where, given, name, first)
            # One format for a file: a second one is a mix-up of files rather than an intention.
            first = first or name
            if name != first:
                raise DataError(
                    f"{where}: this row is {name}, the first is {first}; split the file {OR_REMOVE}"
                )
            if name == PREFERENCE:
                preferences.append((where, _line(Preference.from_json, given, where)))
            else:
                examples, fields = _line(at, where, self._convert, given, public)
                found += [(where, example) for example in examples]
                unused.update(fields)
        if first is None:
            raise DataError(f"{path}: is empty; give a file with at least one {self.what}")
        if preferences:
            return self._from_preferences(preferences)
        fields = {} if self.keeps_row else dict(unused)
        return collect_results(found)._replace(unused_fields=fields)

    def _from_preferences(self, preferences: list[tuple[str, Preference]]) -> ReadResult[T]:
        """Converts the whole file at once: a record may supersede another, or pair with it."""
        lines = {record.id: where for where, record in preferences}
        result = self.from_preferences([record for _, record in preferences])
        places = [lines.get(place, "") for place in result.places]
        unused = {r: [lines.get(i, "") for i in ids] for r, ids in result.unused_places.items()}
        return result._replace(places=places, unused_places=unused)

    def _convert(
        self, given: dict[str, Any], public: PublicFormat | None
    ) -> tuple[list[T | str], list[str]]:
        """A row's examples, or reasons to skip it, and the names of its unused fields."""
        row = Row(given)
        try:
            row.check_weight()
            return self._convert_public(row, public) if public else self._convert_row(row)
        except TiedRow as error:
            if self.convert_tie is None:
                return [error.reason], []
            return [*self.convert_tie(Row(error.row, given))], []
        except UnusableRow as error:
            return [error.reason], []

    def _convert_row(self, row: Row) -> tuple[list[T | str], list[str]]:
        examples = list(self.converters[row_format(row.values) or ""](row))
        texts = [text for example in examples for text in _texts_of(example)]
        # A row without an example lost nothing that a field could add to it.
        used = any(not isinstance(example, str) for example in examples)
        return examples, row.unused_fields(texts, self._checked_fields) if used else []

    def _convert_public(self, row: Row, public: PublicFormat) -> tuple[list[T | str], list[str]]:
        """The same through the rows of our own formats that a public data set's row becomes."""
        examples: list[T | str] = []
        unused: dict[str, None] = {}
        for values in public.translate(row, self.what):
            name = row_format(values)
            if name not in self.converters:
                raise DataError(self._wrong_format(f"{public.name} ({name})", name))
            made, fields = self._convert_row(Row(values, row.given))
            examples += made
            unused |= dict.fromkeys(fields)
        texts = [text for example in examples for text in _texts_of(example)]
        return examples, [*unused, *row.unused_fields(texts, self._checked_fields)]

    @property
    def _checked_fields(self) -> frozenset[str]:
        """The fields that are refused, not counted, if their text is in no example."""
        return PROMPT_FIELDS if self.keeps_row else PROMPT_FIELDS | COMPLETION_FIELDS

    def _refuse_row(
        self, where: str, row: dict[str, Any], name: str | None, first: str | None
    ) -> DataError:
        fields = ", ".join(map(shown, islice(row, 8))) or "none"
        if first is not None:  # a bad line in a good file: the list of formats would not help
            found = (
                f"this row is {name}" if name else f"the fields ({fields}) match no known format"
            )
            return DataError(
                f"{where}: {found}, the first row is {first}; write the same fields {OR_REMOVE}"
            )
        if name is not None:
            return DataError(f"{where}: {self._wrong_format(name, name)}")
        return DataError(
            f"{where}: the row's fields ({fields}) match no known format; "
            f"{self.what}s are one of: {self._formats}"
        )

    def _wrong_format(self, described: str, name: str | None) -> str:
        verb = _VERBS.get(name or "", "openpalm sft")
        return (
            f"this row is {described}, which `{verb}` reads; "
            f"{self.what}s are one of: {self._formats}"
        )

    @property
    def _formats(self) -> str:
        return "; ".join((*self.converters, PREFERENCE))


def _texts_of(value: object) -> Iterator[str]:
    """The texts of the messages and candidates of an example, which is a nested tuple.

    A prompt may be joined from two fields by a blank line; its paragraphs are yielded as well, so
    that the text of each field is found among the texts.
    """
    if isinstance(value, Message):
        yield value.content
        yield from value.content.split("\n\n")
    elif isinstance(value, Candidate):
        yield value.text
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts_of(item)
