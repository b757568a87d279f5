"""THE chat template: messages to token ids and a loss mask, for every verb that talks.

Roles are special tokens placed here and nowhere else, so no text can pretend to be another's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from openpalm.data.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
END = "<|end|>"


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    trained: bool = True
    """whether the loss is on it, where the assistant says it"""

    def to_json(self) -> dict[str, Any]:
        """As a row has it."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        return row if self.trained else row | {"weight": 0}


class Example(NamedTuple):
    """Token ids and, of equal length, whether each is one the model shall learn to say."""

    ids: list[int]
    loss_mask: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Example:
    """The ids of a conversation; the loss is on what the assistant says and on its ending it.

    A turn that is not `trained` has none.

    With `add_generation_prompt`, ends where the assistant's next turn begins: exactly a prefix of
    the ids of the conversation that has the answer.
    """
    template = _Template(tokenizer)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for message in messages:
        opening = template.opening(message.role)
        said = tokenizer.encode(message.content) + template.closing(message.role)
        ids += opening + said
        learnt = message.role == "assistant" and message.trained
        loss_mask += [False] * len(opening) + [learnt] * len(said)
    if add_generation_prompt:
        opening = template.opening("assistant")
        ids += opening
        loss_mask += [False] * len(opening)
    return Example(ids, loss_mask)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an assistant's turn; none where the vocabulary has no such token."""
    ends = (tokenizer.special_id(END), tokenizer.end_of_text)
    return frozenset(i for i in ends if i is not None)


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
