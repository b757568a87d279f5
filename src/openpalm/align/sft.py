"""Supervised fine-tuning (SFT): conversations as examples with the loss on the assistant's turns.

The loss is next-token prediction (Ouyang et al. 2022, section 3.5, "SFT") over the assistant's
tokens and the end marker of each of its turns. The model reads the user's turns but never learns
to write them. So SFT needs no loss of its own: examples in, train.objective.NextToken in THE loop.
A conversation has a row of its own, or shares one (sequence packing) without attention to the
others (Batch.segments); its loss and gradient are the same either way.
"""

from typing import Literal

from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Example, Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError


def to_examples(
    tokenizer: Tokenizer,
    conversations: ReadResult[tuple[Message, ...]],
    template: Literal["chat", "none"],
    sequence_length: int,
) -> ReadResult[Example]:
    """The conversations with a target within `sequence_length`; the others, counted by reason.

    A longer conversation is kept: the loader cuts its end (loader.truncated counts them).
    """

    def fit(messages: tuple[Message, ...]) -> Example | str:
        example = to_example(tokenizer, messages, template)
        if not any(example.loss_mask):
            return "no assistant turn has a weight"
        if not any(example.loss_mask[1 : sequence_length + 1]):
            return f"the prompt fills {sequence_length} tokens, see --sequence-length"
        return example

    return conversations.map(fit)


def to_example(
    tokenizer: Tokenizer,
    messages: tuple[Message, ...],
    template: Literal["chat", "none"] = "chat",
) -> Example:
    """A conversation as ids and loss mask.

    With template none, a prompt and its completion as plain text, up to the end-of-text token.
    Raises DataError where such a conversation has other turns.
    """
    if template == "chat":
        return render(tokenizer, messages)
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"--template none: joins one prompt and one completion, not {', '.join(roles)}; "
            "use --template chat"
        )
    prompt, completion = (tokenizer.encode(message.content) for message in messages)
    completion += [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    return Example(prompt + completion, [False] * len(prompt) + [True] * len(completion))
