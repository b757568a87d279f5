"""Reads demonstrations for supervised fine-tuning (SFT): conversations with a completion."""

from collections.abc import Iterator
from pathlib import Path

from openpalm.data.rows.fields import COMPLETIONS, Row
from openpalm.data.rows.messages import (
    Messages,
    parse_completion,
    parse_conversation,
    parse_prompt,
    parse_solution,
)
from openpalm.data.rows.preferences import demonstrations_from_preferences
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.rows.row_formats import (
    ALPACA,
    COMPLETION,
    MESSAGES,
    PROBLEM,
    SHAREGPT,
    RowReader,
)


def read_demonstrations(path: str | Path) -> ReadResult[Messages]:
    """Conversations of a .jsonl or .jsonl.gz file.

    Formats: messages; ShareGPT's conversations; instruction, input, output (Alpaca); prompt and
    completion or response; question (or prompt, problem) and answer (or solution); preference
    records that write or edit a completion. A prompt that is a text is a user message. Raises
    DataError with line, field and remedy.
    """
    converters = {
        MESSAGES: row_to_conversation,
        SHAREGPT: row_to_conversation,
        ALPACA: completion_row_to_conversation,
        COMPLETION: completion_row_to_conversation,
        PROBLEM: _problem_row_to_conversation,
    }
    return RowReader("conversation", converters, demonstrations_from_preferences).read(path)


def row_to_conversation(row: Row) -> Iterator[Messages | str]:
    yield check_demonstration(parse_conversation(row))


def completion_row_to_conversation(row: Row) -> Iterator[Messages | str]:
    prompt = parse_prompt(row)
    completion = parse_completion(row, row.find_name(COMPLETIONS), prompt)
    yield check_demonstration(prompt + completion)


def _problem_row_to_conversation(row: Row) -> Iterator[Messages | str]:
    yield check_demonstration(parse_prompt(row) + parse_solution(row))


def check_demonstration(messages: Messages) -> Messages | str:
    """The conversation, or the reason why SFT cannot use it: no assistant turn with a loss."""
    turns = [m for m in messages if m.role == "assistant"]
    if not turns:
        return "no assistant turn"
    if not any(m.trained for m in turns):
        return "no assistant turn has a weight"
    return messages if all(m.content.strip() for m in turns) else "empty completion"
