"""Finds the prompt and the completions among the fields of a task, by their names.

Completions are `chosen` and `rejected`, a list (`responses`, `items`), several fields with one stem
(`response_1`, `answer-b`), or one field (`response`). All else that is text is the prompt's.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from openpalm.base.console import names, shown
from openpalm.base.typed import expect
from openpalm.data.rows.fields import (
    COMPLETIONS,
    HISTORY,
    INPUTS,
    MESSAGES,
    PROMPTS,
    RESPONSES,
    SIDES,
    SOLUTIONS,
    SYSTEMS,
    Row,
    is_blank,
)
from openpalm.data.rows.imports.tasks import Roles
from openpalm.data.rows.messages import SPEAKERS, Messages, parse_prompt, parse_text
from openpalm.data.rows.read_result import UnusableRow
from openpalm.errors import DataError

MAX_CANDIDATES = 64
_LISTS = (*RESPONSES, "items", "candidates", "completions", "options", "generations", "outputs")
_SINGLE = (*COMPLETIONS, *SOLUTIONS, "generation", "reply", "candidate", "model_output")
_STEMS = "response|completion|answer|output|reply|generation|candidate|option|text|message|summary"
_NUMBERED = re.compile(rf"(.*(?:{_STEMS}))[ _.-]?([0-9]{{1,3}}|[a-hA-H])")
_ITEM_TEXTS = ("text", "body", "html", "content", "value", "response", "completion", "title")
_SUFFIX = re.compile(r"(?:^|[ _.-])([0-9]{1,3}|[a-h])$")
_SIDE_NAMES = (("left", "first"), ("right", "second"))


class Choice(NamedTuple):
    """A completion, and the names by which answers call it."""

    text: str
    names: tuple[str, ...]


class Content(NamedTuple):
    """The prompt and the completions of a task, and the names of fields that are in neither."""

    prompt: Messages
    choices: tuple[Choice, ...]
    unused: list[str]

    def find(self, name: object) -> int | None:
        """The number of the completion that an answer calls `name`: a field, an id, a letter."""
        wanted = normal(name)
        for i, choice in enumerate(self.choices):
            if wanted and wanted in map(normal, choice.names):
                return i
        return None

    def find_in_question(self, question: str) -> int | None:
        """The completion that a question's name ends with: `rating_2`, `quality of response-b`."""
        ending = _SUFFIX.search(question.casefold())
        if self.find(question) is not None or not ending:
            return self.find(question)
        return self.find(ending.group(1))


def normal(name: object) -> str:
    """A name without case and punctuation, so that `Response 1` equals `response_1`."""
    text = name if isinstance(name, str) else str(name) if type(name) is int else ""
    return re.sub(r"[\W_]+", "", text.casefold())


def is_content_name(name: str, roles: Roles) -> bool:
    """Whether the name of a field says that it holds a prompt or a completion."""
    known = (*PROMPTS, *INPUTS, *SYSTEMS, *HISTORY, *SIDES, *_SINGLE, *_LISTS)
    stated = (roles.prompt, *roles.completions)
    return name in known or name in stated or bool(_NUMBERED.fullmatch(name))


def find_content(fields: dict[str, Any], roles: Roles) -> Content:
    """Raises DataError naming a field, UnusableRow for a prompt that cannot be used."""
    present = {name: value for name, value in fields.items() if not is_blank(value)}
    taken, choices = _find_choices(present, roles)
    if len(choices) > MAX_CANDIDATES:
        raise DataError(f"has {len(choices)} completions; the most are {MAX_CANDIDATES}")
    if len(choices) == 2:
        both = zip(choices, _SIDE_NAMES, strict=True)
        choices = [choice._replace(names=choice.names + sides) for choice, sides in both]
    asked = [roles.prompt] if roles.prompt else [*PROMPTS, *INPUTS]
    if fields.keys() & asked and not present.keys() & asked:
        raise UnusableRow("empty prompt")
    row = _prompt_row({n: v for n, v in present.items() if n not in taken}, roles)
    choices = choices or _last_turn(row)
    prompt = parse_prompt(row)
    unused = [name for name in present if name not in taken and name not in row.given]
    texts = [*(m.content for m in prompt), *(choice.text for choice in choices)]
    unused += row.unused_fields(texts, frozenset())
    return Content(prompt, tuple(choices), unused)


# Completions.


def _find_choices(fields: dict[str, Any], roles: Roles) -> tuple[set[str], list[Choice]]:
    """The names of the fields that hold completions, and the completions."""
    if roles.completions:
        found = [name for name in roles.completions if name in fields]
        if not found:
            raise DataError(
                f"has none of the completions {names(roles.completions)}; its fields are "
                f"{names(fields)}"
            )
        return set(found), _choices_of(fields, found)
    free = [name for name in fields if name != roles.prompt]
    if all(isinstance(fields.get(side), str) for side in SIDES):
        return set(SIDES), _choices_of(fields, SIDES)
    for name in _LISTS:
        if name in free and isinstance(fields[name], list):
            return {name}, _choices_of_list(fields[name], name)
    numbered = _find_numbered(free)
    if len(numbered) > 1:
        return set(numbered), _choices_of(fields, numbered)
    single = [name for name in (*_SINGLE, *numbered) if name in free][:1]
    return set(single), _choices_of(fields, single)


def _find_numbered(fields: Iterable[str]) -> list[str]:
    """The fields of the stem that most fields have, in the order of their numbers."""
    stems: dict[str, list[tuple[int, str, str]]] = {}
    for name in fields:
        if match := _NUMBERED.fullmatch(name):
            stem, ending = match.group(1).casefold(), match.group(2).casefold()
            order = int(ending) if ending.isdigit() else ord(ending)
            stems.setdefault(stem, []).append((order, ending, name))
    best = max(stems.values(), key=len, default=[])
    return [name for _, _, name in sorted(best)]


def _choices_of(fields: dict[str, Any], found: Iterable[str]) -> list[Choice]:
    choices = []
    for name in found:
        expect(name, fields[name], "a text", lambda v: isinstance(v, str))
        match = _NUMBERED.fullmatch(name)
        choices.append(Choice(fields[name], (name, match.group(2)) if match else (name,)))
    return choices


def _choices_of_list(items: list[Any], name: str) -> list[Choice]:
    """The texts of a list, or of its objects (Label Studio's List has id, title, body, html)."""
    choices = []
    for i, item in enumerate(items[: MAX_CANDIDATES + 1]):
        where, label = f"{name}[{i}]", str(i + 1)
        if isinstance(item, dict):
            given = item.get("id")
            label = str(given) if isinstance(given, str | int) else label
            key = next((key for key in _ITEM_TEXTS if not is_blank(item.get(key))), "text")
            where, item = f"{where}.{key}", item.get(key)
        expect(where, item, "a text", lambda v: isinstance(v, str))
        assert isinstance(item, str)
        choices.append(Choice(item, (label,)))
    return choices


# The prompt.


def _last_turn(row: Row) -> list[Choice]:
    """Takes the completion at the end of a chat from the prompt, if there is one."""
    field = row.find_name(PROMPTS)
    turns = row.values.get(field)
    if not (isinstance(turns, list) and turns and isinstance(turns[-1], dict)):
        return []
    last = turns[-1]
    role = last.get("role", last.get("from"))
    if not isinstance(role, str) or SPEAKERS.get(role) != "assistant":
        return []
    row.values[field] = turns[:-1]
    return [Choice(parse_text(last.get("content", last.get("value")), f"{field}[-1].content"), ())]


def _prompt_row(fields: dict[str, Any], roles: Roles) -> Row:
    """The fields that a prompt is read from, under the names that parse_prompt knows."""
    around = {name: fields[name] for name in (*SYSTEMS, *HISTORY) if name in fields}
    if roles.prompt is not None:
        if roles.prompt not in fields:
            raise DataError(f"has no field {shown(roles.prompt)}; its fields are {names(fields)}")
        # Under its own name, so that it is not counted as unused, and as the prompt.
        given = {roles.prompt: fields[roles.prompt]} | around
        return Row({"prompt": fields[roles.prompt]} | around, given)
    known = {name: fields[name] for name in (*PROMPTS, *INPUTS) if name in fields}
    if known:
        return Row(known | around)
    others = [name for name in fields if name not in around]
    for name in (*MESSAGES, "chat", "conversation", "dialogue", "text"):
        if name in others:
            others = [name]
    if len(others) == 1 and isinstance(fields[others[0]], str | list):
        return Row({"prompt": fields[others[0]]} | around, {others[0]: None} | around)
    raise DataError(f"no field has the name of a prompt ({names(fields)}); say which one it is")
