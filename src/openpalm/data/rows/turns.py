"""Turns of a conversation from JSON, in the spellings that public files have.

OpenAI's role and content, ShareGPT's from and value, Anthropic's `Human:` and `Assistant:` texts.
A field of a turn that is not understood is refused, or named.
"""

import re
from collections.abc import Mapping
from typing import Any

from openpalm.base.console import shown
from openpalm.data.rows.fields import TOOLS, WEIGHTS, Row, carries_loss, is_blank
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
"""Fields of a turn that its speaker would say besides the content."""


def messages_of(value: object, field: str, row: Row | None = None) -> Messages:
    """The messages of a JSON list; `row` notes the fields of turns that are not used.

    Without a row such a field is an error. Raises DataError naming the field.
    """
    if not isinstance(value, list):
        raise DataError(
            f'field "{field}" is {_said(value)}; it must be a list of messages '
            "(or a text, beside a prompt or as one)"
        )
    return tuple(_message(turn, f"{field}[{i}]", field, row) for i, turn in enumerate(value))


def _message(turn: object, where: str, field: str, row: Row | None) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(
            f'field "{where}" is {_said(turn)}; it must be an object with role and content '
            "(or from and value)"
        )
    who, what = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    if who == "role" and "content" not in turn and "value" in turn:
        what = "value"
    role = _role(turn.get(who), f"{where}.{who}")
    if any(not is_blank(turn.get(name)) for name in TOOLS):
        raise UnusableRow("a tool call, which the chat template cannot write")
    content = text_of(turn.get(what), f"{where}.{what}")
    for name in _SPOKEN:
        if not is_blank(turn.get(name)):
            raise DataError(
                f'field "{where}.{name}" would be lost; write it into "{what}" or leave it out'
            )
    trained = _trained(turn, role, where)
    noted = row or Row({})
    noted.note(f"{field}[]", turn, (who, what, *TOOLS, *WEIGHTS, *_SPOKEN))
    if row is None and noted.unread:
        raise DataError(f'field "{next(iter(noted.unread))}" is unknown; leave it out')
    return Message(role, content, trained)


def _role(value: object, where: str) -> Role:
    if isinstance(value, str) and value in SPEAKERS:
        return SPEAKERS[value]
    if isinstance(value, str) and value in TOOL_ROLES:
        raise UnusableRow(f"a turn of {value}, which the chat template cannot write")
    raise DataError(f'field "{where}" is {_said(value)}; it must be one of {", ".join(SPEAKERS)}')


def text_of(value: object, where: str) -> str:
    """A text, or the joined texts of a list of parts. Raises UnusableRow for any other part."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise DataError(f'field "{where}" is {_said(value)}; it must be a text')
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict):
            raise DataError(f'field "{where}[{i}]" is {_said(part)}; it must be a part with a text')
        text, kind = part.get("text"), part.get("type", "text")
        if not isinstance(kind, str) or kind not in ("text", "input_text", "output_text"):
            raise UnusableRow(f"a part of type {shown(kind)}, which the model cannot read")
        if not isinstance(text, str):
            raise DataError(f'field "{where}[{i}].text" is {_said(text)}; it must be a text')
        texts.append(text)
    return "".join(texts)


def _trained(turn: Mapping[str, Any], role: Role, where: str) -> bool:
    given = [
        carries_loss(turn[name], f'field "{where}.{name}"')
        for name in WEIGHTS
        if turn.get(name) is not None
    ]
    if role != "assistant" and any(given):
        raise DataError(
            f'field "{where}" asks for the loss on a turn of the {role}; only what the assistant '
            "says is learnt: leave the weight out"
        )
    return all(given)


def hh_messages(text: str, field: str) -> Messages:
    """The turns of `Human: ...` and `Assistant: ...`, each after a blank line."""
    before, *turns = HH_TURN.split(text)
    if before or not turns:
        raise DataError(f'field "{field}" does not begin with "Human:"; write it like the others')
    return tuple(
        Message("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(turns[::2], turns[1::2], strict=True)
    )


def stripped(messages: Messages) -> list[tuple[str, str]]:
    """For comparing: white space around a text says nothing."""
    return [(m.role, m.content.strip()) for m in messages]


def _said(value: object) -> str:
    """A value that is wrong, as a message shows it."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return shown(value)
    return str(value)[:60] if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
