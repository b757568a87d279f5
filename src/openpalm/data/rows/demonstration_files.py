"""What supervised fine-tuning imitates, from files: conversations with at least one answer."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.data.rows.fields import COMPLETIONS, Row
from openpalm.data.rows.preferences import Messages, ReadResult, demonstrations
from openpalm.data.rows.row_formats import (
    ALPACA,
    COMPLETION,
    MESSAGES,
    PROBLEM,
    SHAREGPT,
    Reading,
    answer_of,
    conversation_of,
    prompt_of,
    read_forms,
    solution_of,
    texts_of,
)


def read_demonstrations(path: str | Path) -> ReadResult[Messages]:
    """Conversations of a .jsonl or .jsonl.gz file.

    Forms: messages; ShareGPT's conversations; instruction, input, output (Alpaca); prompt and
    completion or response; question (or prompt, problem) and answer (or solution); Preference
    records that write or edit an answer. A prompt that is a text is the user's turn, its
    completion the assistant's. Raises DataError with line, field and remedy.
    """
    makers = {
        MESSAGES: _messages,
        SHAREGPT: _messages,
        ALPACA: _completion,
        COMPLETION: _completion,
        PROBLEM: _problem,
    }
    return read_forms(path, Reading("conversation", makers, texts_of), demonstrations)


def _messages(row: Row) -> Iterator[Messages | str]:
    yield usable(conversation_of(row))


def _completion(row: Row) -> Iterator[Messages | str]:
    prompt = prompt_of(row)
    yield usable(prompt + answer_of(row, row.name(COMPLETIONS), prompt))


def _problem(row: Row) -> Iterator[Messages | str]:
    yield usable(prompt_of(row) + solution_of(row))


def usable(messages: Messages) -> Messages | str:
    """The conversation, or the reason why there is nothing in it to imitate."""
    answers = [m for m in messages if m.role == "assistant"]
    if not answers:
        return "no assistant turn"
    if not any(m.trained for m in answers):
        return "no assistant turn has a weight"
    return messages if all(m.content.strip() for m in answers) else "empty completion"
