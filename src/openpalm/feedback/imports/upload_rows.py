"""The rows of an uploaded file, one by one, as prompts or as items with candidates.

Reads every format of data/rows and the exports of annotation tools; a row that cannot be used is
yielded as its reason.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openpalm.base.console import shown
from openpalm.data.rows.fields import COMPLETION_FIELDS, COMPLETIONS, PROMPT_FIELDS, Row
from openpalm.data.rows.imports.read_export import Tool, find_tool, import_row
from openpalm.data.rows.imports.tasks import UNJUDGED, Roles
from openpalm.data.rows.messages import Messages, parse_conversation, parse_prompt, parse_responses
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.public_datasets import public_format
from openpalm.data.rows.read_result import StreamCounts, UnusableRow
from openpalm.data.rows.readers.pairs import row_to_pair
from openpalm.data.rows.row_formats import (
    EXPLICIT,
    HH,
    MESSAGES,
    PREFERENCE,
    RANKING,
    SCORED,
    SHAREGPT,
    TEXT,
    TEXTS,
    WHOLE,
    row_format,
)
from openpalm.data.rows.row_stream import Given, stream_rows
from openpalm.errors import DataError

MAX_PROMPT = 2**20
NO_TIME = "1970-01-01T00:00:00Z"
"""the time of judgements without one; items have no time of a judgement"""


@dataclass(frozen=True)
class UploadedItem:
    """A prompt and the completions that the file has for it."""

    prompt: Messages
    candidates: tuple[tuple[str, str], ...] = ()
    """(text, checkpoint) of each; the checkpoint is empty if the file does not say it"""
    judgements: tuple[tuple[str, dict[str, Any]], ...] = ()
    """kind and payload of each of the file's own judgements"""
    notes: tuple[str, ...] = ()
    """the parts of the row that are ignored, each as a message"""


def read_prompts(path: Path, name: str) -> Iterator[tuple[str, UploadedItem | str]]:
    """(place, prompt or reason) of each row; `name` stands for the path in places."""
    return _read(path, name, _prompt_of)


def read_items(path: Path, name: str) -> Iterator[tuple[str, UploadedItem | str]]:
    """The same for rows with completions to judge."""
    return _read(path, name, _item_of)


def _read(
    path: Path, name: str, convert: Callable[[Given, Tool | None], UploadedItem]
) -> Iterator[tuple[str, UploadedItem | str]]:
    is_table = path.name.endswith(".csv")  # all is text there, also what the tools give as numbers
    for where, row in stream_rows(path, name):
        if isinstance(row, str):
            yield where, row
            continue
        try:
            yield where, convert(row, None if is_table else find_tool(row))
        except UnusableRow as error:
            yield where, error.reason
        except DataError as error:
            yield where, str(error)
        except RecursionError:
            yield where, "nested too deeply"


# A row -> a prompt, or a prompt with completions.


def _prompt_of(given: Given, tool: Tool | None = None) -> UploadedItem:
    if tool:
        return UploadedItem(_item_of_task(given, tool).prompt)
    row = _row_of(given, "prompt")
    name = row_format(row.values)
    if name == PREFERENCE:
        return UploadedItem(Preference.from_json(given).prompt)
    if name in (MESSAGES, SHAREGPT):
        prompt = _without_completion(parse_conversation(row))
    elif name == TEXT:
        prompt = parse_prompt(Row({"prompt": row.get("text")}))
    elif name in (HH, TEXTS, WHOLE):
        prompt = next(iter(row_to_pair(row))).prompt
    elif name is None:
        raise _unknown(given)
    else:
        prompt = parse_prompt(row)
    return _noted(row, UploadedItem(_checked(prompt)), PROMPT_FIELDS)


def _item_of(given: Given, tool: Tool | None) -> UploadedItem:
    if tool:
        return _item_of_task(given, tool)
    row = _row_of(given, "pair")
    name = row_format(row.values)
    if name == PREFERENCE:
        return _item_of_record(Preference.from_json(given))
    if name in (EXPLICIT, HH, TEXTS, WHOLE):
        pair = next(iter(row_to_pair(row)))
        sides = (_answer(pair.chosen), ""), (_answer(pair.rejected), "")
        better = {"better": 0, "worse": 1, "strength": 1}
        item = UploadedItem(_checked(pair.prompt), sides, (("compare", better),))
    elif name in (RANKING, SCORED) or row.has("responses") or row.has("answers"):
        candidates = tuple((text, "") for text in parse_responses(row))
        item = UploadedItem(_checked(parse_prompt(row)), candidates)
    elif completion := _completion(row):
        item = UploadedItem(_prompt_of(given).prompt, ((completion, ""),))
        row.used |= PROMPT_FIELDS | COMPLETION_FIELDS
    else:
        return _prompt_of(given)
    return _noted(row, item, PROMPT_FIELDS | COMPLETION_FIELDS)


def _row_of(given: Given, what: str) -> Row:
    """The row in a format of ours, also if it is of a public data set."""
    public = public_format(given)
    translated = list(public.translate(Row(given), what)) if public else [given]
    if len(translated) != 1:
        raise UnusableRow(f"{len(translated)} examples in one row")
    row = Row(translated[0], given)
    row.check_weight()
    return row


def _noted(row: Row, item: UploadedItem, roles: frozenset[str]) -> UploadedItem:
    """The item with the names of fields that nobody reads; a text among them is an error."""
    contents = [message.content for message in item.prompt]
    paragraphs = [part for text in contents for part in text.split("\n\n")]
    texts = [*contents, *paragraphs, *(text for text, _ in item.candidates)]
    unused = row.unused_fields(texts, roles)
    notes = tuple(f"without its field {shown(name)}" for name in unused)
    return replace(item, notes=notes)


def _item_of_record(record: Preference) -> UploadedItem:
    candidates = tuple((c.text, c.checkpoint or "") for c in record.candidates)
    return UploadedItem(record.prompt, candidates, ((record.kind, record.payload),))


def _item_of_task(given: Given, tool: Tool) -> UploadedItem:
    """An item has what people saw and judged; only records have who judged it, and when."""
    counts = StreamCounts()
    task = import_row("row", given, tool, Roles(), counts, NO_TIME)
    candidates = tuple((c.text, c.checkpoint or "") for c in task.candidates)
    judgements = tuple((p.kind, p.payload) for p in task.preferences)
    notes = tuple(f"without {reason}" for reason in counts.unused if reason != UNJUDGED)
    return UploadedItem(_checked(task.prompt), candidates, judgements, notes)


def _completion(row: Row) -> str | None:
    """The one completion of a row that has no other."""
    for name in COMPLETIONS:
        if isinstance(value := row.values.get(name), str) and value.strip():
            return value
    if row.has("messages") or row.has("conversations"):
        last = parse_conversation(row)[-1]
        return last.content if last.role == "assistant" else None
    return None


def _answer(turns: Messages) -> str:
    if len(turns) != 1:
        raise UnusableRow("a completion of several turns")
    return turns[0].content


def _without_completion(messages: Messages) -> Messages:
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _checked(messages: Messages) -> Messages:
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise UnusableRow("no user turn before the last completion")
    if messages[-1].role == "assistant":
        raise UnusableRow("the prompt ends with an answer")
    if sum(len(m.content) for m in messages) > MAX_PROMPT:
        raise UnusableRow(f"a prompt of more than {MAX_PROMPT:,} characters")
    return messages


def _unknown(given: Given) -> UnusableRow:
    fields = ", ".join(sorted(str(name)[:30] for name in given)[:8]) or "none"
    return UnusableRow(f"its fields ({fields}) match no known format")
