"""Prompts from files, for what generates its own answers: reinforcement learning, best-of-n."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.data.rows.fields import Row
from openpalm.data.rows.preferences import Messages, Preference, ReadResult, check_prompt
from openpalm.data.rows.read_result import collect_results
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
    Reading,
    conversation_of,
    prompt_of,
    read_forms,
    texts_of,
)


class PromptRow(NamedTuple):
    """What is answered, and the whole row as it was, for the reward: its `answer`, for one."""

    prompt: Messages
    row: dict[str, Any]


def read_prompts(path: str | Path) -> ReadResult[PromptRow]:
    """Prompts of a .jsonl or .jsonl.gz file.

    Forms: a prompt (or question, problem; a text or messages) with any other fields beside it;
    the rows of other verbs, of which the prompt is taken; messages and ShareGPT's conversations,
    cut before the last turn of the assistant; Preference records, each prompt once. Raises
    DataError with line, field and remedy.
    """
    forms = (PROMPT, PROBLEM, ALPACA, COMPLETION, EXPLICIT, RANKING, SCORED, RATING, LABELLED)
    unanswered = _maker(lambda row: _unanswered(conversation_of(row)))
    makers = dict.fromkeys(forms, _maker(prompt_of)) | {MESSAGES: unanswered, SHAREGPT: unanswered}
    return read_forms(path, Reading("prompt", makers, _texts, keeps_row=True), _of_records)


def _texts(found: PromptRow) -> Iterator[str]:
    return texts_of(found.prompt)


def _maker(prompt: Callable[[Row], Messages]) -> Callable[[Row], Iterator[PromptRow | str]]:
    def make(row: Row) -> Iterator[PromptRow | str]:
        messages = prompt(row)
        if not any(m.role == "user" and m.content.strip() for m in messages):
            yield "nothing is asked before the last answer"
            return
        check_prompt(messages)
        yield PromptRow(messages, row.given)

    return make


def _unanswered(messages: Messages) -> Messages:
    """Up to the last answer, which is left out, or to the end where the last turn asks."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    return messages[:last] if last == len(messages) - 1 else messages


def _of_records(records: list[Preference]) -> ReadResult[PromptRow]:
    seen: set[Messages] = set()

    def made(record: Preference) -> PromptRow | str:
        if record.prompt in seen:
            return "repeated prompt"
        seen.add(record.prompt)
        return PromptRow(record.prompt, record.to_json())

    return collect_results((record.id, made(record)) for record in records)
