"""Prompts from files, for what generates its own answers: reinforcement learning, best-of-n."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from openpalm.data.forms import (
    ALPACA,
    COMPLETION,
    EXPLICIT,
    MESSAGES,
    PROBLEM,
    PROMPT,
    RANKING,
    RATING,
    SHAREGPT,
    VERDICT,
    alpaca_prompt,
    prompt_of,
    read_forms,
    sharegpt_messages,
    with_system,
)
from openpalm.data.preferences import Messages, Preference, Usable, check_prompt, messages_of


class PromptRow(NamedTuple):
    """What is answered, and the whole row as it was, for the reward: its `answer`, for one."""

    prompt: Messages
    row: dict[str, Any]


def read_prompts(path: str | Path) -> Usable[PromptRow]:
    """Prompts of a .jsonl or .jsonl.gz file.

    Forms: a prompt (or question, problem; a text or messages) with any other fields beside it;
    instruction and input (Alpaca); messages and ShareGPT's conversations, cut before the last
    turn of the assistant; Preference records, each prompt once. Raises DataError with line,
    field and remedy.
    """
    prompted = (PROMPT, PROBLEM, COMPLETION, EXPLICIT, RANKING, RATING, VERDICT)
    makers = dict.fromkeys(prompted, _maker(prompt_of)) | {
        ALPACA: _maker(alpaca_prompt),
        MESSAGES: _maker(
            lambda row: _unanswered(with_system(row, messages_of(row[MESSAGES], MESSAGES)))
        ),
        SHAREGPT: _maker(lambda row: _unanswered(sharegpt_messages(row))),
    }
    return read_forms(path, "prompt", makers, _of_records)


def _maker(
    prompt: Callable[[dict[str, Any]], Messages],
) -> Callable[[dict[str, Any]], Iterator[PromptRow | str]]:
    def make(row: dict[str, Any]) -> Iterator[PromptRow | str]:
        messages = prompt(row)
        if not any(m.role == "user" and m.content.strip() for m in messages):
            yield "nothing is asked before the last answer"
            return
        check_prompt(messages)
        yield PromptRow(messages, row)

    return make


def _unanswered(messages: Messages) -> Messages:
    """Up to the last answer, which is left out, or to the end where the last turn asks."""
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    return messages[:last] if last == len(messages) - 1 else messages


def _of_records(records: list[Preference]) -> Usable[PromptRow]:
    once = {record.prompt: record for record in reversed(records)}
    rows = [PromptRow(prompt, once[prompt].to_json()) for prompt in reversed(once)]
    repeated = len(records) - len(rows)
    return Usable(rows, {"repeated prompt": repeated} if repeated else {})
