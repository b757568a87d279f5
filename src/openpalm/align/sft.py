"""Supervised fine-tuning: conversations as records whose assistant turns carry the loss.

The loss is next-token prediction (Ouyang et al. 2022, section 3.5, "SFT") over the assistant's
tokens and the end marker of each of its turns, and over nothing else: what the user wrote is read,
never imitated. So SFT needs no loss of its own: records in, train.objective.NextToken on THE loop.
One conversation is one row; nothing is packed, so nothing can attend across conversations.
"""

from collections.abc import Iterable

from openpalm.data.conversation import Message, render
from openpalm.data.loader import Record
from openpalm.data.tokenizer import Tokenizer
from openpalm.errors import DataError


def records(tokenizer: Tokenizer, conversations: Iterable[tuple[Message, ...]]) -> list[Record]:
    """Each conversation as ids and loss mask. Raises DataError where none has an assistant turn."""
    rendered = [Record(*render(tokenizer, messages)) for messages in conversations]
    if not any(any(record.loss_mask) for record in rendered):
        raise DataError("no conversation has an assistant turn; there is nothing to learn from")
    return rendered
