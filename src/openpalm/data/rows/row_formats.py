"""What form the rows of a .jsonl have: THE place that tells, by all of a row's keys.

Owns the names of the forms, which verb reads each, and the fields that several forms share.
All rows of a file are in one form; a row that makes no sense is refused with file, line and field.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from openpalm.base.console import shown
from openpalm.base.typed import at, expect, is_number
from openpalm.data.corpus.document_reader import read_rows
from openpalm.data.corpus.sources import is_rows
from openpalm.data.rows.fields import (
    ANSWERED,
    ASKED,
    COMPLETIONS,
    HISTORY,
    INPUTS,
    PROMPTS,
    RATINGS,
    RESPONSES,
    SIDES,
    SOLUTIONS,
    SYSTEMS,
    Row,
    said,
)
from openpalm.data.rows.preferences import (
    Messages,
    Preference,
    ReadResult,
    assistant_turn,
    check_prompt,
)
from openpalm.data.rows.public_datasets import Shape, shape_of, trees_of
from openpalm.data.rows.read_result import TiedRow, UnusableRow, collect_results
from openpalm.data.rows.turns import HH_TURN, hh_messages, messages_of, stripped
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

T = TypeVar("T")

RECORD = "a Preference record"
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

PAIRS = (EXPLICIT, HH, TEXTS, WHOLE, RANKING, SCORED)

_READERS = dict.fromkeys(PAIRS, "openpalm dpo") | {
    RATING: "openpalm reward",
    LABELLED: "openpalm dpo --loss kto",
    PROMPT: "openpalm grpo",
    TEXT: "openpalm data prepare",
}


def row_format(row: Mapping[str, Any]) -> str | None:
    """The name of the row's form, None where it has none; a field that is null is not there."""
    has = {name for name, value in row.items() if value is not None}
    asked = has & {*PROMPTS}
    prompted, completed = asked or has & {*INPUTS}, has & {*COMPLETIONS}
    found = [
        (RECORD, {"kind", "payload"} <= has),
        (_pair_form(row), has & {*SIDES}),
        (RANKING, has & {*RESPONSES} and has & {"ranking", "rank"}),
        (SCORED, prompted and has & {*RESPONSES} and "scores" in has),
        (LABELLED, prompted and completed and isinstance(row.get("label"), bool)),
        (RATING, prompted and completed and has & {*RATINGS, "ratings"}),
        (MESSAGES, "messages" in has),
        (SHAREGPT, "conversations" in has),
        (ALPACA, "instruction" in has and completed),
        (COMPLETION, prompted and completed),
        (PROBLEM, prompted and has & {*SOLUTIONS}),
        (PROMPT, asked),
        (TEXT, "text" in has),
    ]
    return next((form for form, is_it in found if is_it), None)


def _pair_form(row: Mapping[str, Any]) -> str:
    if any(row.get(name) is not None for name in (*PROMPTS, *INPUTS)):
        return EXPLICIT
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return HH if HH_TURN.match(row["chosen"]) else TEXTS
    return WHOLE


class Reading(NamedTuple):
    """What the makers of a verb's items need, beside the rows."""

    what: str
    """names one item in messages"""
    makers: Mapping[str, Callable[[Row], Iterable[Any]]]
    """of each form: a row's items, or the reasons why there is none"""
    texts: Callable[[Any], Iterable[str]]
    """all that an item shows the model, to find what a row's other fields would add"""
    keeps_row: bool = False
    """whether the whole row stays beside the item, so that only what is asked can be lost"""

    tied: Callable[[Row], Iterable[Any]] | None = None
    """what two answers judged equally good give, where ties are read"""

    @property
    def roles(self) -> frozenset[str]:
        """The fields that must not be lost."""
        return ASKED if self.keeps_row else ASKED | ANSWERED


def read_forms(
    path: str | Path, reading: Reading, of_records: Callable[[list[Preference]], ReadResult[T]]
) -> ReadResult[T]:
    """What the rows of a .jsonl or .jsonl.gz file give, in any one of the forms of the makers.

    `of_records` does for Preference records what a maker does for rows. Raises DataError.
    """
    path, what = Path(path), reading.what
    if not is_rows(path):
        raise DataError(f"{path}: {what}s are read from .jsonl or .jsonl.gz; convert it")
    records: dict[str, list[Preference]] = {}
    found: list[tuple[str, T | str]] = []
    fields: Counter[str] = Counter()
    first = None
    for where, given in trees_of(read_rows(path)):
        shape = shape_of(given)
        form = shape.name if shape else row_format(given)
        if shape is None and (form is None or form not in (RECORD, *reading.makers)):
            raise _unread(where, given, form, reading)
        first = first or form
        if form != first:
            raise DataError(f"{where}: this row is {form}, the first is {first}; split the file")
        if form == RECORD:
            records.setdefault(where, []).append(Preference.from_json(given, where))
        else:
            items, unread = at(where, _items, given, shape, reading)
            found += [(where, item) for item in items]
            fields.update(unread)
    if first is None:
        raise DataError(f"{path}: is empty; give a file with at least one {what}")
    if records:
        return _with_lines(records, of_records)
    return collect_results(found)._replace(unused_fields={} if reading.keeps_row else dict(fields))


def _with_lines(
    records: Mapping[str, list[Preference]], of_records: Callable[[list[Preference]], ReadResult[T]]
) -> ReadResult[T]:
    """What the records give, with their lines in place of their ids."""
    lines = {record.id: where for where, at_line in records.items() for record in at_line}
    given = of_records([record for at_line in records.values() for record in at_line])
    places = [lines.get(place, "") for place in given.places]
    left_out = {r: [lines.get(i, "") for i in ids] for r, ids in given.unused_places.items()}
    return given._replace(places=places, unused_places=left_out)


def _items(
    given: dict[str, Any], shape: Shape | None, reading: Reading
) -> tuple[list[Any], list[str]]:
    """A row's items, or reasons for leaving it out, and the names of the fields not used."""
    row = Row(given)
    try:
        row.check_weight()
        if shape is None:
            return _made(row, reading)
        items, unread, texts = [], {}, []
        for values in shape.translate(row, reading.what):
            part = Row(values, given)
            form = row_format(values)
            if form not in reading.makers:
                raise DataError(_refusal(f"{shape.name} ({form})", form, reading))
            made, also = _made(part, reading)
            items += made
            used = [item for item in made if not isinstance(item, str)]
            texts += [text for item in used for text in reading.texts(item)]
            unread |= dict.fromkeys(also)
        return items, [*unread, *row.leftover(texts, reading.roles)]
    except TiedRow as error:
        return list(reading.tied(Row(error.row, given))) if reading.tied else [error.reason], []
    except UnusableRow as error:
        return [error.reason], []


def _made(row: Row, reading: Reading) -> tuple[list[Any], list[str]]:
    items = list(reading.makers[row_format(row.values) or ""](row))
    used = [item for item in items if not isinstance(item, str)]
    if not used:
        return items, []
    texts = [text for item in used for text in reading.texts(item)]
    return items, row.leftover(texts, reading.roles)


def _unread(where: str, row: dict[str, Any], form: str | None, reading: Reading) -> DataError:
    if form is None:
        fields = ", ".join(map(shown, islice(row, 8))) or "none"
        wanted = "; ".join((*reading.makers, RECORD))
        return DataError(
            f"{where}: the row's fields ({fields}) make no form that is known; "
            f"{reading.what}s are one of: {wanted}"
        )
    return DataError(f"{where}: {_refusal(form, form, reading)}")


def _refusal(name: str, form: str | None, reading: Reading) -> str:
    reader = _READERS.get(form or "", "openpalm sft")
    wanted = "; ".join((*reading.makers, RECORD))
    return f"this row is {name}, which `{reader}` reads; {reading.what}s are one of: {wanted}"


# Fields that several forms share.


def prompt_of(row: Row) -> Messages:
    """The messages that are answered: a text is the user's, HH's ends with `Assistant:`.

    An `input` or `context` beside a text follows it after a blank line, a `history` of earlier
    turns and a `system` go before it. Raises UnusableRow or DataError naming the field.
    """
    field = row.name(PROMPTS)
    if not row.has(field):
        field = row.name((*PROMPTS, *INPUTS))
    prompt = row.get(field)
    if not isinstance(prompt, str):
        messages = messages_of(prompt, field, row)
    elif HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        messages = hh_messages(prompt, field)[:-1]
    else:
        messages = (Message("user", _with_input(row, field, prompt)),)
    messages = (*_history(row), *messages)
    check_prompt(messages)
    return with_system(row, messages)


def _with_input(row: Row, field: str, prompt: str) -> str:
    names = [name for name in INPUTS if name != field]
    more = row.get(row.name(names)) if names else None
    wanted = "a text or null"
    expect(row.name(names), more, wanted, lambda v: v is None or isinstance(v, str))
    return "\n\n".join(part for part in (prompt, more or "") if part.strip())


def _history(row: Row) -> Messages:
    """Earlier turns: pairs of what was asked and answered, or messages."""
    field = row.name(HISTORY)
    turns = row.get(field)
    if turns is None:
        return ()
    expect(field, turns, "a list of earlier turns", lambda v: isinstance(v, list))
    if all(isinstance(turn, dict) for turn in turns):
        return messages_of(turns, field, row)
    for i, turn in enumerate(turns):
        expect(f"{field}[{i}]", turn, "a question and its answer, two texts", _is_exchange)
    roles = ("user", "assistant")
    return tuple(
        Message(role, text) for turn in turns for role, text in zip(roles, turn, strict=True)
    )


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def with_system(row: Row, messages: Messages) -> Messages:
    """The messages behind the row's `system` or `system_prompt`, where it has one."""
    field = row.name(SYSTEMS)
    text = row.values.get(field)
    expect(field, text, "a text or null", lambda v: v is None or isinstance(v, str))
    if any(m.role == "system" for m in messages):
        return messages  # the row's own is not read: an error, unless both are the same
    row.get(field)
    return (Message("system", text), *messages) if text and text.strip() else messages


def answer_of(row: Row, field: str, prompt: Messages) -> Messages:
    """The answer in `field`: a text, or messages or an HH text, which may repeat the prompt."""
    value = row.get(field)
    if isinstance(value, str) and not HH_TURN.match(value):
        return assistant_turn(value)
    messages = hh_messages(value, field) if isinstance(value, str) else None
    messages = messages_of(value, field, row) if messages is None else messages
    repeats = stripped(messages[: len(prompt)]) == stripped(prompt)
    return messages[len(prompt) :] if repeats else messages


def check_answer(answer: Messages, field: str) -> None:
    """Raises UnusableRow, naming the field, for what is no answer."""
    if not answer or any(m.role == "assistant" and not m.content.strip() for m in answer):
        raise UnusableRow("empty completion", f'field "{field}" has an empty completion')
    if answer[0].role != "assistant":
        raise UnusableRow(f"{field} does not begin as an answer to the prompt")
    if answer[-1].role != "assistant":
        raise UnusableRow(f"{field} does not end with an assistant turn")


def solution_of(row: Row) -> Messages:
    """A verifiable answer: a text, or a number."""
    field = row.name(SOLUTIONS)
    value = row.get(field)
    expect(field, value, "a text or a number", lambda v: isinstance(v, str) or is_number(v))
    return assistant_turn(str(value))


def conversation_of(row: Row) -> Messages:
    """The messages of a row of `messages`, or of ShareGPT's `conversations`."""
    field = "messages" if row.has("messages") else "conversations"
    return with_system(row, messages_of(row.get(field), field, row))


def responses_of(row: Row) -> list[str]:
    """Two or more answers to one prompt."""
    field = row.name(RESPONSES)
    texts = row.get(field)
    wanted = "a list of two or more texts (or let --model write them)"
    expect(field, texts, wanted, lambda v: isinstance(v, list) and len(v) > 1)
    assert isinstance(texts, list)
    for i, text in enumerate(texts):
        expect(f"{field}[{i}]", text, "a text", lambda v: isinstance(v, str))
    return texts


def texts_of(messages: Iterable[Message]) -> Iterator[str]:
    """The texts of messages, and those of a prompt that an input was joined to, apart."""
    for text in said(messages):
        yield text
        yield from text.split("\n\n")
