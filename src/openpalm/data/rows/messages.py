"""Parses the messages of a row: prompt, completion, or a whole conversation.

Turns are read as OpenAI writes them (role, content), as ShareGPT does (from, value), and from
Anthropic's HH texts (`Human:`, `Assistant:`). A field of a turn without a known meaning is an
error, or it is named in the report.
"""

import re
from collections.abc import Mapping
from typing import Any

from openpalm.base.console import shown
from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import (
    COMPLETIONS,
    HISTORY,
    INPUTS,
    PROMPTS,
    RESPONSES,
    SOLUTIONS,
    SYSTEMS,
    TOOLS,
    WEIGHTS,
    Row,
    is_blank,
    read_weight,
)
from openpalm.data.rows.read_result import UnusableRow
from openpalm.data.text.conversation import Message, Role
from openpalm.errors import DataError

Messages = tuple[Message, ...]

HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "developer": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_SPOKEN = ("reasoning_content", "reasoning", "thinking", "refusal", "audio")
"""Fields of a turn with more output of its speaker than the content."""


# The prompt, the completion or the conversation of a row.


def parse_prompt(row: Row) -> Messages:
    """The prompt: a text is a user message, an HH text ends with `Assistant:`.

    An `input` or `context` is appended to a text after a blank line; the turns of `history` and a
    `system` message go in front. Raises UnusableRow or DataError naming the field.
    """
    field = row.find_name(PROMPTS)
    if not row.has(field):
        field = row.find_name((*PROMPTS, *INPUTS))
    prompt = row.get(field)
    if not isinstance(prompt, str):
        messages = parse_messages(prompt, field, row)
    elif HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        messages = parse_hh_text(prompt, field)[:-1]
    else:
        messages = (Message("user", _with_input(row, field, prompt)),)
    messages = (*_parse_history(row), *messages)
    check_prompt(messages)
    return add_system_message(row, messages)


def _with_input(row: Row, field: str, prompt: str) -> str:
    """The prompt with the text of `input` or `context` after it (Alpaca's format)."""
    names = [name for name in INPUTS if name != field]
    more = row.get(row.find_name(names)) if names else None
    wanted = "a text or null"
    expect(row.find_name(names), more, wanted, lambda v: v is None or isinstance(v, str))
    return "\n\n".join(part for part in (prompt, more or "") if part.strip())


def _parse_history(row: Row) -> Messages:
    """Earlier turns: a list of [question, answer] texts, or of messages."""
    field = row.find_name(HISTORY)
    turns = row.get(field)
    if turns is None:
        return ()
    expect(field, turns, "a list of earlier turns", lambda v: isinstance(v, list))
    if all(isinstance(turn, dict) for turn in turns):
        return parse_messages(turns, field, row)
    for i, turn in enumerate(turns):
        expect(f"{field}[{i}]", turn, "a question and its answer, two texts", _is_exchange)
    roles = ("user", "assistant")
    return tuple(
        Message(role, text) for turn in turns for role, text in zip(roles, turn, strict=True)
    )


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def add_system_message(row: Row, messages: Messages) -> Messages:
    """The messages after the row's `system` or `system_prompt`, if it has one."""
    field = row.find_name(SYSTEMS)
    text = row.values.get(field)
    expect(field, text, "a text or null", lambda v: v is None or isinstance(v, str))
    if any(m.role == "system" for m in messages):
        # The field stays unread: unused_fields() refuses it unless both texts are equal.
        return messages
    row.get(field)
    return (Message("system", text), *messages) if text and text.strip() else messages


def parse_completion(row: Row, field: str, prompt: Messages) -> Messages:
    """The completion in `field`: a text, messages or an HH text; a repeated prompt is removed."""
    value = row.get(field)
    if isinstance(value, str) and not HH_TURN.match(value):
        return assistant_turn(value)
    messages = parse_hh_text(value, field) if isinstance(value, str) else None
    messages = parse_messages(value, field, row) if messages is None else messages
    repeats = stripped(messages[: len(prompt)]) == stripped(prompt)
    return messages[len(prompt) :] if repeats else messages


def parse_prompt_and_completion(row: Row) -> tuple[Messages, Messages]:
    """The prompt and the one completion of a row that rates or labels it."""
    prompt, field = parse_prompt(row), row.find_name(COMPLETIONS)
    completion = parse_completion(row, field, prompt)
    check_completion(completion, field)
    return prompt, completion


def parse_solution(row: Row) -> Messages:
    """A verifiable answer, a text or a number, as an assistant turn."""
    field = row.find_name(SOLUTIONS)
    value = row.get(field)
    expect(field, value, "a text or a number", lambda v: isinstance(v, str) or is_number(v))
    return assistant_turn(str(value))


def parse_conversation(row: Row) -> Messages:
    """The messages of `messages`, or of ShareGPT's `conversations`."""
    field = "messages" if row.has("messages") else "conversations"
    return add_system_message(row, parse_messages(row.get(field), field, row))


def parse_responses(row: Row) -> list[str]:
    """Two or more completions of one prompt."""
    field = row.find_name(RESPONSES)
    texts = row.get(field)
    wanted = "a list of two or more texts (or let --model write them)"
    expect(field, texts, wanted, lambda v: isinstance(v, list) and len(v) > 1)
    assert isinstance(texts, list)
    for i, text in enumerate(texts):
        expect(f"{field}[{i}]", text, "a text", lambda v: isinstance(v, str))
    return texts


def assistant_turn(text: str) -> Messages:
    """A completion of one turn."""
    return (Message("assistant", text),)


def check_prompt(prompt: Messages) -> None:
    """Raises UnusableRow for a prompt without a user message, or with a completion at its end."""
    if not any(m.role == "user" and m.content.strip() for m in prompt):
        raise UnusableRow(
            "empty prompt",
            'field "prompt" has no user turn with text; write what the model completes',
        )
    if prompt[-1].role == "assistant":
        raise UnusableRow(
            "the prompt ends with an assistant turn",
            'field "prompt" ends with an assistant turn; end it with a user turn',
        )


def check_completion(completion: Messages, field: str) -> None:
    """Raises UnusableRow, naming the field, if these messages do not complete a prompt."""
    if not completion or any(m.role == "assistant" and not m.content.strip() for m in completion):
        raise UnusableRow("empty completion", f'field "{field}" has an empty completion')
    if completion[0].role != "assistant":
        raise UnusableRow(f"{field} does not begin with an assistant turn")
    if completion[-1].role != "assistant":
        raise UnusableRow(f"{field} does not end with an assistant turn")


# Lists of turns, and HH texts.


def parse_messages(value: object, field: str, row: Row | None = None) -> Messages:
    """The messages of a JSON list; `row` notes the unused fields of its turns.

    Without a row, an unused field is an error. Raises DataError naming the field.
    """
    if not isinstance(value, list):
        raise DataError(
            f'field "{field}" is {_shown(value)}; it must be a list of messages, '
            "or a text if it is a prompt or a completion"
        )
    return tuple(_parse_message(turn, f"{field}[{i}]", field, row) for i, turn in enumerate(value))


def _parse_message(turn: object, where: str, field: str, row: Row | None) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(
            f'field "{where}" is {_shown(turn)}; it must be an object with role and content '
            "(or from and value)"
        )
    who, what = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    if who == "role" and "content" not in turn and "value" in turn:
        what = "value"
    role = _parse_role(turn.get(who), f"{where}.{who}")
    if any(not is_blank(turn.get(name)) for name in TOOLS):
        raise UnusableRow("a tool call, which the chat template cannot write")
    content = parse_text(turn.get(what), f"{where}.{what}")
    # The speaker's other output would change the example: an error, not a line in the report.
    for name in _SPOKEN:
        if not is_blank(turn.get(name)):
            raise DataError(
                f'field "{where}.{name}" would be lost; write it into "{what}" or leave it out'
            )
    trained = _is_trained(turn, role, where)
    noted = row or Row({})
    noted.note_unused(f"{field}[]", turn, (who, what, *TOOLS, *WEIGHTS, *_SPOKEN))
    if row is None and noted.unused_nested:
        raise DataError(f'field "{next(iter(noted.unused_nested))}" is unknown; leave it out')
    return Message(role, content, trained)


def _parse_role(value: object, where: str) -> Role:
    if isinstance(value, str) and value in SPEAKERS:
        return SPEAKERS[value]
    if isinstance(value, str) and value in TOOL_ROLES:
        raise UnusableRow(f"a turn of {value}, which the chat template cannot write")
    raise DataError(f'field "{where}" is {_shown(value)}; it must be one of {", ".join(SPEAKERS)}')


def parse_text(value: object, where: str) -> str:
    """A text, or the joined texts of a list of content parts (OpenAI's format).

    Raises UnusableRow for any other type of part, such as an image.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f'field "{where}" is {_shown(value)}; it must be a text')
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise DataError(
                f'field "{where}[{i}]" is {_shown(part)}; it must be a part with a text'
            )
        text, kind = part.get("text"), part.get("type", "text")
        if not isinstance(kind, str) or kind not in ("text", "input_text", "output_text"):
            raise UnusableRow(f"a part of type {shown(kind)}, which the model cannot read")
        if not isinstance(text, str):
            raise DataError(f'field "{where}[{i}].text" is {_shown(text)}; it must be a text')
        texts.append(text)
    return "".join(texts)


def _is_trained(turn: Mapping[str, Any], role: Role, where: str) -> bool:
    """Whether the loss includes this turn, by its `weight` or `train` field."""
    given = [
        read_weight(turn[name], f'field "{where}.{name}"')
        for name in WEIGHTS
        if turn.get(name) is not None
    ]
    if role != "assistant" and any(given):
        raise DataError(
            f'field "{where}" asks for the loss on a turn of the {role}; only turns of the '
            "assistant have a loss: leave the weight out"
        )
    return all(given)


def parse_hh_text(text: str, field: str) -> Messages:
    """The turns of `Human: ...` and `Assistant: ...`, each after a blank line."""
    before, *turns = HH_TURN.split(text)
    if before or not turns:
        raise DataError(f'field "{field}" does not begin with "Human:"; write it like the others')
    return tuple(
        Message("user" if who == "Human" else "assistant", content.strip())
        for who, content in zip(turns[::2], turns[1::2], strict=True)
    )


def stripped(messages: Messages) -> list[tuple[str, str]]:
    """(role, text without outer white space) of each message, for comparisons."""
    return [(m.role, m.content.strip()) for m in messages]


def _shown(value: object) -> str:
    """A wrong value in a message, shortened."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return shown(value)
    return str(value)[:60] if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
