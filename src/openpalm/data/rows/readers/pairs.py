"""Reads preference pairs, chosen and rejected completions of a prompt, from files of rows."""

from collections.abc import Iterator
from itertools import chain, combinations, takewhile
from pathlib import Path

from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import MARGINS, SCORES, SIDES, Row, is_blank
from openpalm.data.rows.messages import (
    Messages,
    add_system_message,
    assistant_turn,
    check_completion,
    check_prompt,
    parse_completion,
    parse_hh_text,
    parse_messages,
    parse_prompt,
    parse_responses,
    stripped,
)
from openpalm.data.rows.preferences import (
    Pair,
    Tie,
    pair_or_reason,
    pairs_from_preferences,
    pairs_from_ranking,
    ties_from_preferences,
)
from openpalm.data.rows.read_result import ReadResult, UnusableRow
from openpalm.data.rows.row_formats import (
    EXPLICIT,
    HH,
    RANKING,
    SCORED,
    TEXTS,
    WHOLE,
    RowReader,
    row_format,
)
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError


def read_pairs(path: str | Path) -> ReadResult[Pair]:
    """Pairs of a .jsonl or .jsonl.gz file.

    Formats: preference records; prompt, chosen, rejected (texts or messages; the completions may
    repeat the prompt); chosen and rejected alone, with the prompt as their common beginning:
    message lists, Anthropic HH texts, or plain texts, split at white space; prompt, responses and
    `rank` (of each response, lower is better, equal is a tie), `ranking` (numbers of the
    responses from 0, best first; a nested list is a tie) or `scores`; the formats of
    data/rows/public_datasets.py. A pair may have a `margin`, or scores of both completions. Raises
    DataError with line, field and remedy.
    """
    converters = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), row_to_pair)
    converters |= {RANKING: _ranking_row_to_pairs, SCORED: _scored_row_to_pairs}
    return RowReader("pair", converters, pairs_from_preferences).read(path)


def read_ties(path: str | Path) -> list[Tie]:
    """The ties of a file that `read_pairs` reads.

    Of preference records, of responses with equal rank or score, and of public data sets that have
    a judgement for ties (LMSYS arena, HelpSteer).
    """

    def no_tie(row: Row) -> Iterator[Tie]:
        return iter(())

    converters = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), no_tie)
    converters |= {RANKING: _ranking_row_to_ties, SCORED: _scored_row_to_ties}
    reader = RowReader("pair", converters, ties_from_preferences, convert_tie=row_to_tie)
    return reader.read(path).items


def row_to_tie(row: Row) -> Iterator[Tie]:
    prompt, first, second = _parse_sides(row, row_format(row.values))
    if not prompt:
        return
    try:
        check_prompt(prompt)
        check_completion(first, "chosen")
        check_completion(second, "rejected")
    except UnusableRow:  # read_pairs reports this row as a tie
        return
    yield Tie(prompt, first, second)


def _ranking_row_to_ties(row: Row) -> Iterator[Tie]:
    texts = parse_responses(row)
    for i, j in chain.from_iterable(combinations(group, 2) for group in _parse_order(row)):
        yield Tie(parse_prompt(row), assistant_turn(texts[i]), assistant_turn(texts[j]))


def _scored_row_to_ties(row: Row) -> Iterator[Tie]:
    prompt, texts, scores = parse_prompt(row), parse_responses(row), parse_scores(row)
    for i, j in combinations(range(len(texts)), 2):
        if scores[i] == scores[j]:
            yield Tie(prompt, assistant_turn(texts[i]), assistant_turn(texts[j]))


def row_to_pair(row: Row) -> Iterator[Pair]:
    for name in SIDES:
        if not row.has(name):
            raise DataError(
                f'field "{name}" is missing; write "prompt", "chosen" and "rejected", '
                "or both completions with the conversation before them"
            )
    prompt, chosen, rejected = _parse_sides(row, row_format(row.values))
    if stripped(chosen) == stripped(rejected):
        raise UnusableRow("equal completions", 'field "chosen" equals "rejected"; correct this row')
    if not prompt:
        raise UnusableRow("no prompt, and the completions have no common beginning")
    check_prompt(prompt)
    check_completion(chosen, "chosen")
    check_completion(rejected, "rejected")
    yield Pair(add_system_message(row, prompt), chosen, rejected, _parse_margin(row))


def _parse_sides(row: Row, name: str | None) -> tuple[Messages, Messages, Messages]:
    """The prompt and the chosen and rejected completion of a row in the format `name`."""
    chosen, rejected = (row.get(side) for side in SIDES)
    if name == TEXTS:
        for side in SIDES:
            if not row.get(side).strip():
                raise UnusableRow("empty completion")
        return _split_texts(chosen, rejected)
    if name == HH:
        return _split_conversations(*(parse_hh_text(row.get(side), side) for side in SIDES))
    if name != EXPLICIT:
        return _split_conversations(*(parse_messages(row.get(side), side, row) for side in SIDES))
    used = {*row.used}
    prompt = parse_prompt(row)
    completions = [parse_completion(row, side, prompt) for side in SIDES]
    if all(messages and messages[0].role != "assistant" for messages in completions):
        # Both sides are whole conversations that spell the prompt in another way. Their common
        # beginning is the prompt; the prompt field counts as unread again, so that a text that
        # is missing in the conversations is refused.
        row.used = used
        return _split_conversations(*completions)
    return prompt, completions[0], completions[1]


def _parse_margin(row: Row) -> float | None:
    """The row's own margin, or the difference of the scores of both completions."""
    field = row.find_name(MARGINS)
    margin = row.get(field)
    expect(field, margin, "a number or null", lambda v: v is None or is_number(v))
    if margin is not None:
        return float(margin)
    for names in SCORES:
        if not any(is_blank(row.values.get(name)) for name in names):
            scores = [row.get(name) for name in names]
            for name, score in zip(names, scores, strict=True):
                expect(name, score, "a number or null", is_number)
            return float(scores[0] - scores[1])
    return None


def _split_conversations(
    chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages]:
    """The common beginning of two conversations (the prompt), and the rest of each."""
    both = zip(stripped(chosen), stripped(rejected), strict=False)
    n = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
    return chosen[:n], chosen[n:], rejected[n:]


def _split_texts(chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    """The same for texts, split at white space."""
    both = zip(chosen, rejected, strict=False)
    n = len(list(takewhile(lambda letters: letters[0] == letters[1], both)))
    # "The sky is" and "The sky isn't" share "The sky is": step back to whole words.
    while n and not chosen[n - 1].isspace():
        n -= 1
    prompt = (Message("user", chosen[:n].strip()),) if chosen[:n].strip() else ()
    return prompt, assistant_turn(chosen[n:].strip()), assistant_turn(rejected[n:].strip())


def _ranking_row_to_pairs(row: Row) -> Iterator[Pair | str]:
    texts, prompt = parse_responses(row), parse_prompt(row)
    return pairs_from_ranking(prompt, texts, _parse_order(row))


def _scored_row_to_pairs(row: Row) -> Iterator[Pair | str]:
    """Pairs of responses with different scores; the difference is the margin."""
    prompt, texts, scores = parse_prompt(row), parse_responses(row), parse_scores(row)
    for i, j in combinations(sorted(range(len(texts)), key=lambda i: -scores[i]), 2):
        gap = scores[i] - scores[j]
        yield pair_or_reason(prompt, texts[i], texts[j], gap) if gap else "tie"


def parse_scores(row: Row) -> list[float]:
    """The score of each of the responses."""
    return list(map(float, _parse_numbers(row, "scores", "score")))


def _parse_order(row: Row) -> list[list[int]]:
    """The numbers of the responses in groups of equal rank, best first."""
    if row.has("ranking"):
        return _parse_ranking(row)
    ranks = _parse_numbers(row, "rank", "rank")
    return [[i for i, rank in enumerate(ranks) if rank == r] for r in sorted(set(ranks))]


def _parse_numbers(row: Row, field: str, one: str) -> list[float]:
    numbers, n = row.get(field), len(parse_responses(row))
    expect(
        field,
        numbers,
        f"{n} numbers, the {one} of each response",
        lambda v: isinstance(v, list) and len(v) == n and all(map(is_number, v)),
    )
    return numbers


def _parse_ranking(row: Row) -> list[list[int]]:
    given, n = row.get("ranking"), len(parse_responses(row))
    groups = given if isinstance(given, list) else []
    order = [group if isinstance(group, list) else [group] for group in groups]
    numbers = [i for group in order for i in group]
    if not all(type(i) is int for i in numbers) or sorted(numbers) != list(range(n)):
        raise DataError(
            f'field "ranking" must be the numbers 0 to {n - 1} of the responses, best first; '
            'write the rank of each response as "rank"'
        )
    return [group for group in order if group]
