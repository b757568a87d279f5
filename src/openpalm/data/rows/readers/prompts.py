"""Reads prompts from files, for algorithms that generate completions: PPO, GRPO, best-of-n."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.data.rows.fields import Row
from openpalm.data.rows.messages import Messages, check_prompt, parse_conversation, parse_prompt
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.read_result import ReadResult, collect_results
from openpalm.data.rows.row_formats import (
    ALPACA,
    COMPLETION,
    EXPLICIT,
    LABELLED,
    MESSAGES,
    PROBLEM,
    PROMPT,
    RANKING,
    RATING,
    SCORED,
    SHAREGPT,
    RowReader,
)

_FORMATS: tuple[str, ...] = (
    *(PROMPT, PROBLEM, ALPACA, COMPLETION),
    *(EXPLICIT, RANKING, SCORED, RATING, LABELLED),
)


class PromptRow(NamedTuple):
    """A prompt, and the whole row as given, for rewards that read it (its `answer`, say)."""

    prompt: Messages
    row: dict[str, Any]


def read_prompts(path: str | Path) -> ReadResult[PromptRow]:
    """Prompts of a .jsonl or .jsonl.gz file.

    Formats: a prompt (or question, problem; a text or messages) with any other fields; the rows of
    other verbs, without their completion; messages and ShareGPT's conversations, cut before the
    last turn of the assistant; preference records, each prompt once. Raises DataError with line,
    field and remedy.
    """
    converters = dict.fromkeys(_FORMATS, row_to_prompt) | {
        MESSAGES: _conversation_row_to_prompt,
        SHAREGPT: _conversation_row_to_prompt,
    }
    return RowReader("prompt", converters, _from_preferences, keeps_row=True).read(path)


def row_to_prompt(row: Row) -> Iterator[PromptRow | str]:
    yield _prompt_row(parse_prompt(row), row)


def _conversation_row_to_prompt(row: Row) -> Iterator[PromptRow | str]:
    yield _prompt_row(_without_completion(parse_conversation(row)), row)


def _prompt_row(messages: Messages, row: Row) -> PromptRow | str:
    if not any(m.role == "user" and m.content.strip() for m in messages):
        return "no user turn before the last completion"
    check_prompt(messages)
    return PromptRow(messages, row.given)


def _without_completion(messages: Messages) -> Messages:
    """Drops a completion at the end; a conversation that ends with a user turn stays whole."""
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _from_preferences(preferences: list[Preference]) -> ReadResult[PromptRow]:
    seen: set[Messages] = set()

    def convert(record: Preference) -> PromptRow | str:
        if record.prompt in seen:
            return "repeated prompt"
        seen.add(record.prompt)
        return PromptRow(record.prompt, record.to_json())

    return collect_results((record.id, convert(record)) for record in preferences)
