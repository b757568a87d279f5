"""THE chat template: messages to token ids and a loss mask, for every verb that talks.

Roles are special tokens placed here and nowhere else, so no text can pretend to be another's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from openpalm.data.corpus import shown
from openpalm.data.tokenizer import Tokenizer
from openpalm.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


class Rendered(NamedTuple):
    """Token ids and, of equal length, whether each is one the model shall learn to say."""

    ids: list[int]
    loss_mask: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, answer_next: bool = False
) -> Rendered:
    """The ids of a conversation; the loss is on what the assistant says and on its ending it.

    With `answer_next`, ends where the assistant's next turn begins: exactly a prefix of the ids of
    the conversation that has the answer.
    """
    template = _Template(tokenizer)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for message in messages:
        opening = template.opening(message.role)
        said = tokenizer.encode(message.content) + template.closing(message.role)
        ids += opening + said
        loss_mask += [False] * len(opening) + [message.role == "assistant"] * len(said)
    if answer_next:
        opening = template.opening("assistant")
        ids += opening
        loss_mask += [False] * len(opening)
    return Rendered(ids, loss_mask)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an assistant's turn; none where the vocabulary has no such token."""
    ends = (tokenizer.special_id(END), tokenizer.end_of_text)
    return frozenset(i for i in ends if i is not None)


def parse_messages(obj: object, where: str) -> tuple[Message, ...]:
    """The messages of `{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises DataError that calls the object `where` ("path:line") and names the field.
    """
    messages = cast(dict[str, Any], obj).get("messages") if isinstance(obj, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f'{where}: "messages" must be a list of at least one {{"role", "content"}}; '
            f"it is {_shape(messages)}"
        )
    return tuple(_message(item, f"{where}: messages[{i}]") for i, item in enumerate(messages))


class _Template:
    """What is written before and after each turn.

    With our markers: `<|user|>text<|end|><|assistant|>text<|end|>`. Without: `User: text`, a blank
    line, `Assistant: text`, end of text or a blank line. Each part is encoded by itself, so that
    a prompt's ids do not depend on the answer that follows.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        markers = {role: tokenizer.special_id(f"<|{role}|>") for role in ROLES}
        end = tokenizer.special_id(END)
        marked = end is not None and None not in markers.values()
        self._markers = cast(dict[str, int], markers) if marked else {}
        self._end = cast(int, end)

    def opening(self, role: Role) -> list[int]:
        if self._markers:
            return [self._markers[role]]
        return self._tokenizer.encode(f"{role.capitalize()}: ")

    def closing(self, role: Role) -> list[int]:
        if self._markers:
            return [self._end]
        end = self._tokenizer.end_of_text
        if role == "assistant" and end is not None:
            return [end]
        return self._tokenizer.encode("\n\n")


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f'{where} is {_shape(item)}; it must be {{"role": ..., "content": ...}}')
    fields = cast(dict[str, Any], item)
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        said = shown(role) if isinstance(role, str) else _shape(role)
        raise DataError(f'{where}: "role" is {said}; it must be {", ".join(ROLES)}')
    if not isinstance(content, str):
        raise DataError(f'{where}: "content" is {_shape(content)}; it must be a text')
    return Message(cast(Role, role), content)


def _shape(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
