"""What supervised fine-tuning imitates, from files: conversations with at least one answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpalm.data.forms import (
    ALPACA,
    COMPLETION,
    COMPLETIONS,
    MESSAGES,
    PROBLEM,
    SHAREGPT,
    alpaca_prompt,
    answer_of,
    name_of,
    prompt_of,
    read_forms,
    sharegpt_messages,
    solution_of,
    with_system,
)
from openpalm.data.preferences import Messages, Usable, demonstrations, expect, messages_of, says


def read_demonstrations(path: str | Path) -> Usable[Messages]:
    """Conversations of a .jsonl or .jsonl.gz file.

    Forms: messages; ShareGPT's conversations; instruction, input, output (Alpaca); prompt and
    completion or response; question (or prompt, problem) and answer (or solution); Preference
    records that write or edit an answer. A prompt that is a text is the user's turn, its
    completion the assistant's. Raises DataError with line, field and remedy.
    """
    makers = {
        MESSAGES: _messages,
        SHAREGPT: _sharegpt,
        ALPACA: _alpaca,
        COMPLETION: _completion,
        PROBLEM: _problem,
    }
    return read_forms(path, "conversation", makers, demonstrations)


def _messages(row: dict[str, Any]) -> Iterator[Messages | str]:
    yield usable(with_system(row, messages_of(row[MESSAGES], MESSAGES)))


def _sharegpt(row: dict[str, Any]) -> Iterator[Messages | str]:
    yield usable(sharegpt_messages(row))


def _alpaca(row: dict[str, Any]) -> Iterator[Messages | str]:
    expect("output", row["output"], "a text", lambda v: isinstance(v, str))
    yield usable(alpaca_prompt(row) + says(row["output"]))


def _completion(row: dict[str, Any]) -> Iterator[Messages | str]:
    prompt = prompt_of(row)
    yield usable(prompt + answer_of(row, name_of(row, COMPLETIONS), prompt))


def _problem(row: dict[str, Any]) -> Iterator[Messages | str]:
    yield usable(prompt_of(row) + solution_of(row))


def usable(messages: Messages) -> Messages | str:
    """The conversation, or the reason why there is nothing in it to imitate."""
    answers = [m for m in messages if m.role == "assistant"]
    if not answers:
        return "no assistant turn"
    return messages if all(m.content.strip() for m in answers) else "empty answer"
