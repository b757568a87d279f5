"""Supervised fine-tuning: conversations as records whose assistant turns carry the loss.

The loss is next-token prediction (Ouyang et al. 2022, section 3.5, "SFT") over the assistant's
tokens and the end marker of each of its turns, and over nothing else: what the user wrote is read,
never imitated. So SFT needs no loss of its own: records in, train.objective.NextToken on THE loop.
A conversation is a row of its own, or shares one where nothing can attend from one conversation to
another (Batch.segments); its loss and its gradient are the same either way.
"""

from collections.abc import Iterable
from typing import Literal

from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Example, Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError


def records(
    tokenizer: Tokenizer,
    conversations: Iterable[tuple[Message, ...]],
    template: Literal["chat", "none"] = "chat",
) -> list[Example]:
    """Each conversation as ids and loss mask. Raises DataError where none has an assistant turn.

    Without a template a conversation is a prompt and its continuation, up to the end of the text.
    """
    make = _continuation if template == "none" else _conversation
    rendered = [make(tokenizer, messages) for messages in conversations]
    if not any(any(record.loss_mask) for record in rendered):
        raise DataError("no conversation has an assistant turn; there is nothing to learn from")
    return rendered


def fitting(
    tokenizer: Tokenizer,
    conversations: ReadResult[tuple[Message, ...]],
    template: Literal["chat", "none"],
    sequence_length: int,
) -> ReadResult[Example]:
    """The conversations with something to learn within the window, and why the others have none.

    A conversation that is longer stays and is cut at its end (data.loader.truncated counts them).
    """
    make = _continuation if template == "none" else _conversation

    def made(messages: tuple[Message, ...]) -> Example | str:
        record = make(tokenizer, messages)
        if not any(record.loss_mask):
            return "no assistant turn has a weight"
        if not any(record.loss_mask[1 : sequence_length + 1]):
            return f"the prompt fills {sequence_length} tokens, see --sequence-length"
        return record

    return conversations.map(made)


def _conversation(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> Example:
    return Example(*render(tokenizer, messages))


def _continuation(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> Example:
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"--template none: joins one prompt and one answer, not {', '.join(roles)}; "
            "use --template chat"
        )
    asked, answered = (tokenizer.encode(message.content) for message in messages)
    answered += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return Example(asked + answered, [False] * len(asked) + [True] * len(answered))
