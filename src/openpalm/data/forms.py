"""What form the rows of a .jsonl have: THE place that tells, by all of a row's keys.

Owns the names of the forms, which verb reads each, and the fields that several forms share.
All rows of a file are in one form; a row that makes no sense is refused with file, line and field.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from openpalm.data.conversation import Message
from openpalm.data.corpus import read_rows, shown
from openpalm.data.preferences import (
    Messages,
    Preference,
    Usable,
    at,
    check_prompt,
    expect,
    is_number,
    messages_of,
    says,
)
from openpalm.data.sources import is_rows
from openpalm.errors import DataError

T = TypeVar("T")

RECORD = "a Preference record"
EXPLICIT = "prompt, chosen, rejected"
HH = "Anthropic HH texts"
TEXTS = "whole texts"
WHOLE = "whole conversations"
RANKING = "prompt, responses, ranking"
RATING = "prompt, response, rating"
VERDICT = "prompt, completion, label"
MESSAGES = "messages"
SHAREGPT = "ShareGPT conversations"
ALPACA = "instruction, input, output"
COMPLETION = "prompt, completion"
PROBLEM = "question, answer"
PROMPT = "a prompt alone"
TEXT = "a text"

PAIRS = (EXPLICIT, HH, TEXTS, WHOLE, RANKING)
PROMPTS = ("prompt", "question", "problem")
COMPLETIONS = ("completion", "response")
ANSWERS = ("answer", "solution")
RESPONSES = ("responses", "answers")
RATINGS = ("rating", "score", "label")

_READERS = dict.fromkeys(PAIRS, "openpalm dpo") | {
    RATING: "openpalm reward",
    VERDICT: "openpalm dpo --loss kto",
    PROMPT: "openpalm grpo",
    TEXT: "openpalm data prepare",
}
HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def form_of(row: Mapping[str, Any]) -> str | None:
    """The name of the row's form, None where it has none; a field that is null is not there."""
    has = {name for name, value in row.items() if value is not None}
    prompted, completed = has & {*PROMPTS}, has & {*COMPLETIONS}
    found = [
        (RECORD, {"kind", "payload"} <= has),
        (_pair_form(row), has & {"chosen", "rejected"}),
        (RANKING, has & {*RESPONSES} and has & {"ranking", "rank"}),
        (VERDICT, prompted and completed and isinstance(row.get("label"), bool)),
        (RATING, prompted and completed and has & {*RATINGS}),
        (MESSAGES, "messages" in has),
        (SHAREGPT, "conversations" in has),
        (ALPACA, {"instruction", "output"} <= has),
        (COMPLETION, prompted and completed),
        (PROBLEM, prompted and has & {*ANSWERS}),
        (PROMPT, prompted),
        (TEXT, "text" in has),
    ]
    return next((form for form, is_it in found if is_it), None)


def _pair_form(row: Mapping[str, Any]) -> str:
    if row.get("prompt") is not None:
        return EXPLICIT
    if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
        return HH if HH_TURN.match(row["chosen"]) else TEXTS
    return WHOLE


def read_forms(
    path: str | Path,
    what: str,
    makers: Mapping[str, Callable[[dict[str, Any]], Iterable[T | str]]],
    of_records: Callable[[list[Preference]], Usable[T]],
) -> Usable[T]:
    """What the rows of a .jsonl or .jsonl.gz file give, in any one of the forms of `makers`.

    A maker gives a row's items, or the reason why there is none; `of_records` does the same for
    Preference records. `what` names one item in messages. Raises DataError.
    """
    path = Path(path)
    if not is_rows(path):
        raise DataError(f"{path}: {what}s are read from .jsonl or .jsonl.gz; convert it")
    records: list[Preference] = []
    found: list[T | str] = []
    first = None
    for where, row in read_rows(path):
        form = form_of(row)
        if form is None or form not in (RECORD, *makers):
            wanted = "; ".join((*makers, RECORD))
            raise DataError(f"{where}: {_unread(row, form)}; {what}s are one of: {wanted}")
        first = first or form
        if form != first:
            raise DataError(f"{where}: this row is {form}, the first is {first}; split the file")
        if form == RECORD:
            records.append(Preference.from_json(row, where))
        else:
            found += at(where, lambda make, row: list(make(row)), makers[form], row)
    if first is None:
        raise DataError(f"{path}: is empty; give a file with at least one {what}")
    if records:
        return of_records(records)
    unused = Counter(item for item in found if isinstance(item, str))
    return Usable([item for item in found if not isinstance(item, str)], dict(unused))


def _unread(row: dict[str, Any], form: str | None) -> str:
    if form is None:
        fields = ", ".join(map(shown, islice(row, 8))) or "none"
        return f"the row's fields ({fields}) make no form that is known"
    reader = _READERS.get(form, "openpalm sft")
    return f"this row is {form}, which `{reader}` reads"


# Fields that several forms share.


def name_of(row: Mapping[str, Any], names: Iterable[str]) -> str:
    """Which of several spellings of a field the row has; the first where it has none."""
    names = list(names)
    return next((name for name in names if row.get(name) is not None), names[0])


def prompt_of(row: Mapping[str, Any]) -> Messages:
    """The messages that are answered: a text is the user's, HH's ends with `Assistant:`.

    A `system` or `system_prompt` beside it goes before it. Raises DataError naming the field.
    """
    field = name_of(row, PROMPTS)
    prompt = row.get(field)
    if not isinstance(prompt, str):
        messages = messages_of(prompt, field)
    elif HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        messages = hh_messages(prompt, field)[:-1]
    else:
        messages = (Message("user", prompt),)
    check_prompt(messages)
    return with_system(row, messages)


def with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """The messages behind the row's `system` or `system_prompt`, where it has one."""
    field = name_of(row, ("system", "system_prompt"))
    text = row.get(field)
    expect(field, text, "a text or null", lambda v: v is None or isinstance(v, str))
    if not text or not text.strip() or any(m.role == "system" for m in messages):
        return messages
    return (Message("system", text), *messages)


def alpaca_prompt(row: Mapping[str, Any]) -> Messages:
    """The instruction, a blank line and the input, as the user's turn."""
    parts = [row["instruction"], row.get("input") or ""]
    for field, part in zip(("instruction", "input"), parts, strict=True):
        expect(field, part, "a text", lambda v: isinstance(v, str))
    messages = (Message("user", "\n\n".join(part for part in parts if part.strip())),)
    check_prompt(messages)
    return with_system(row, messages)


def answer_of(row: Mapping[str, Any], field: str, prompt: Messages) -> Messages:
    """The answer in `field`: a text, or messages, which may repeat the prompt."""
    value = row.get(field)
    if isinstance(value, str):
        return says(value)
    messages = messages_of(value, field)
    repeats = stripped(messages[: len(prompt)]) == stripped(prompt)
    return messages[len(prompt) :] if repeats else messages


def check_answer(answer: Messages, field: str) -> None:
    """Raises DataError, naming the field, for what is no answer."""
    if not answer or any(m.role == "assistant" and not m.content.strip() for m in answer):
        raise DataError(f'field "{field}" has an empty answer; mend this line or leave it out')
    if not answer[0].role == answer[-1].role == "assistant":
        raise DataError(
            f'field "{field}" must begin and end with an assistant turn after the prompt; '
            "write it as an answer to the prompt"
        )


def solution_of(row: Mapping[str, Any]) -> Messages:
    """A verifiable answer: a text, or a number."""
    field = name_of(row, ANSWERS)
    value = row.get(field)
    expect(field, value, "a text or a number", lambda v: isinstance(v, str) or is_number(v))
    return says(str(value))


def hh_messages(text: str, field: str) -> Messages:
    """The turns of `Human: ...` and `Assistant: ...`, each after a blank line."""
    before, *turns = HH_TURN.split(text)
    if before or not turns:
        raise DataError(f'field "{field}" does not begin with "Human:"; write it like the others')
    return tuple(
        Message("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    )


def sharegpt_messages(row: Mapping[str, Any]) -> Messages:
    """The messages of `{"conversations": [{"from": ..., "value": ...}, ...]}`."""
    turns, field = row.get("conversations"), "conversations"
    expect(field, turns, "a list of turns, each with from and value", lambda v: isinstance(v, list))
    assert isinstance(turns, list)
    return with_system(row, tuple(_turn(turn, f"{field}[{i}]") for i, turn in enumerate(turns)))


_SPEAKERS: dict[Any, Any] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bing", "bard"), "assistant"),
}


def _turn(turn: object, field: str) -> Message:
    expect(field, turn, 'an object with "from" and "value"', lambda v: isinstance(v, dict))
    assert isinstance(turn, dict)
    who, said = (
        turn.get(name_of(turn, names)) for names in (("from", "role"), ("value", "content"))
    )
    wanted = f"one of {', '.join(_SPEAKERS)}"
    expect(f"{field}.from", who, wanted, lambda v: isinstance(v, str) and v in _SPEAKERS)
    expect(f"{field}.value", said, "a text", lambda v: isinstance(v, str))
    return Message(_SPEAKERS[who], str(said))


def stripped(messages: Messages) -> list[tuple[str, str]]:
    """For comparing: white space around a text says nothing."""
    return [(m.role, m.content.strip()) for m in messages]
