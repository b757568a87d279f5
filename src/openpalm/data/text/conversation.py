"""The chat template: renders the messages of a conversation to token ids and a loss mask.

One template for training, sampling and serving. Roles are special tokens, and only this module
writes them: no text of a message can imitate a turn of another role.
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
    """whether the loss includes this turn; only turns of the assistant are trained"""

    def to_json(self) -> dict[str, Any]:
        """The message as a row of a file has it."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        return row if self.trained else row | {"weight": 0}


class Example(NamedTuple):
    """Token ids and, for each id, whether it is in the loss."""

    ids: list[int]
    loss_mask: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> Example:
    """The token ids of a conversation, and its loss mask: each `trained` turn of the assistant,
    with the token that ends it.

    With `add_generation_prompt`, the ids end with the opening of an assistant turn: a prefix of the
    ids of the conversation with the completion, so that training and generation see the same.
    """
    template = _Template(tokenizer)
    ids: list[int] = []
    loss_mask: list[bool] = []
    for message in messages:
        opening = template.opening(message.role)
        content = tokenizer.encode(message.content) + template.closing(message.role)
        ids += opening + content
        trained = message.role == "assistant" and message.trained
        # The opening is given at generation; the model must learn the end, or it never stops.
        loss_mask += [False] * len(opening) + [trained] * len(content)
    if add_generation_prompt:
        opening = template.opening("assistant")
        ids += opening
        loss_mask += [False] * len(opening)
    return Example(ids, loss_mask)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an assistant's turn; empty if the vocabulary has no such token."""
    ends = (tokenizer.special_id(END), tokenizer.end_of_text)
    return frozenset(i for i in ends if i is not None)


class _Template:
    """The ids before and after each turn.

    With our special tokens: `<|user|>text<|end|><|assistant|>text<|end|>`. With a vocabulary that
    lacks them: `User: text`, a blank line, `Assistant: text`, end of text or a blank line. Opening,
    content and closing are encoded separately, so that a prompt's ids do not depend on what
    follows.
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
