"""Pairs of answers from files, in the forms that people keep them in (data/rows/row_formats.py)."""

from collections.abc import Iterator
from itertools import chain, combinations, takewhile
from pathlib import Path
from typing import Any

from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import MARGINS, SCORES, SIDES, Row, is_blank
from openpalm.data.rows.preferences import (
    Messages,
    Pair,
    ReadResult,
    Tie,
    assistant_turn,
    check_prompt,
    contest,
    pairs,
    ranked,
    ties,
)
from openpalm.data.rows.read_result import UnusableRow
from openpalm.data.rows.row_formats import (
    EXPLICIT,
    HH,
    RANKING,
    SCORED,
    TEXTS,
    WHOLE,
    Reading,
    answer_of,
    check_answer,
    prompt_of,
    read_forms,
    responses_of,
    row_format,
    texts_of,
    with_system,
)
from openpalm.data.rows.turns import hh_messages, messages_of, stripped
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError


def read_pairs(path: str | Path) -> ReadResult[Pair]:
    """Pairs of a .jsonl or .jsonl.gz file.

    Forms: Preference records; prompt, chosen, rejected (texts or messages; the answers may
    repeat the prompt); chosen and rejected alone, whose common beginning is the prompt: message
    lists, Anthropic HH texts, or plain texts, parted at a white space; prompt, responses and
    `rank` (of each response, lower is better, equal is a tie), `ranking` (numbers of the
    responses from 0, best first; those in a list of their own are tied) or `scores`; the public
    shapes of data/rows/public_datasets.py. A pair may have a `margin`, or scores of both answers.
    Raises DataError with line, field and remedy.
    """
    makers = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), row_pair) | {
        RANKING: _ranking,
        SCORED: _scored,
    }
    return read_forms(path, Reading("pair", makers, _texts), pairs)


def read_ties(path: str | Path) -> list[Tie]:
    """The ties of a file that `read_pairs` reads.

    Of Preference records, of responses with one rank or score, and of public shapes that have a
    verdict for ties (LMSYS arena, HelpSteer).
    """

    def none(row: Row) -> Iterator[Tie]:
        return iter(())

    makers = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), none) | {
        RANKING: _tied_ranks,
        SCORED: _tied_scores,
    }
    reading = Reading("pair", makers, _texts, tied=_tied)
    return read_forms(path, reading, ties).items


def _tied(row: Row) -> Iterator[Tie]:
    prompt, first, second = _sides(row, row_format(row.values))
    if not prompt:
        return
    try:
        check_prompt(prompt)
        check_answer(first, "chosen")
        check_answer(second, "rejected")
    except UnusableRow:  # counted as a tie where pairs are read
        return
    yield Tie(prompt, first, second)


def _tied_ranks(row: Row) -> Iterator[Tie]:
    texts = responses_of(row)
    order = (_order if row.has("ranking") else _order_of_ranks)(row, len(texts))
    for i, j in chain.from_iterable(combinations(group, 2) for group in order):
        yield Tie(prompt_of(row), assistant_turn(texts[i]), assistant_turn(texts[j]))


def _tied_scores(row: Row) -> Iterator[Tie]:
    prompt, texts, scores = prompt_of(row), responses_of(row), scores_of(row)
    for i, j in combinations(range(len(texts)), 2):
        if scores[i] == scores[j]:
            yield Tie(prompt, assistant_turn(texts[i]), assistant_turn(texts[j]))


def _texts(pair: Pair | Tie) -> Iterator[str]:
    prompt, first, second = pair[:3]
    return texts_of((*prompt, *first, *second))


def row_pair(row: Row) -> Iterator[Pair]:
    for name in SIDES:
        if not row.has(name):
            raise DataError(
                f'field "{name}" is missing; write "prompt", "chosen" and "rejected", '
                "or both answers with the conversation before them"
            )
    prompt, chosen, rejected = _sides(row, row_format(row.values))
    if stripped(chosen) == stripped(rejected):
        raise UnusableRow("equal completions", 'field "chosen" equals "rejected"; correct this row')
    if not prompt:
        raise UnusableRow("no prompt, and the answers have no common beginning")
    check_prompt(prompt)
    check_answer(chosen, "chosen")
    check_answer(rejected, "rejected")
    yield Pair(with_system(row, prompt), chosen, rejected, _margin(row))


def _sides(row: Row, form: str | None) -> tuple[Messages, Messages, Messages]:
    """The prompt and the two answers."""
    chosen, rejected = (row.get(side) for side in SIDES)
    if form == TEXTS:
        for side in SIDES:
            if not row.get(side).strip():
                raise UnusableRow("empty completion")
        return _part_texts(chosen, rejected)
    if form != EXPLICIT:
        parse = _hh if form == HH else messages_of
        return _part(*(parse(row.get(side), side, row) for side in SIDES))
    before = {*row.used}
    prompt = prompt_of(row)
    answers = [answer_of(row, side, prompt) for side in SIDES]
    if all(answer and answer[0].role != "assistant" for answer in answers):
        # Whole conversations that do not begin with the prompt as it stands here: what they share
        # is the prompt, and the field's own text must be in it.
        row.used = before
        return _part(*answers)
    return prompt, answers[0], answers[1]


def _hh(text: str, field: str, row: Row) -> Messages:
    return hh_messages(text, field)


def _margin(row: Row) -> float | None:
    """The row's own, or the difference of both answers' scores."""
    field = row.name(MARGINS)
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


def _part(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The common beginning, and what follows it on either side."""
    both = zip(stripped(chosen), stripped(rejected), strict=False)
    n = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
    return chosen[:n], chosen[n:], rejected[n:]


def _part_texts(chosen: str, rejected: str) -> tuple[Messages, Messages, Messages]:
    """The same for texts, cut at white space: a word that both begin alike stays whole in both."""
    both = zip(chosen, rejected, strict=False)
    n = len(list(takewhile(lambda letters: letters[0] == letters[1], both)))
    while n and not chosen[n - 1].isspace():
        n -= 1
    prompt = (Message("user", chosen[:n].strip()),) if chosen[:n].strip() else ()
    return prompt, assistant_turn(chosen[n:].strip()), assistant_turn(rejected[n:].strip())


def _ranking(row: Row) -> Iterator[Pair | str]:
    texts = responses_of(row)
    order = _order if row.has("ranking") else _order_of_ranks
    return ranked(prompt_of(row), texts, order(row, len(texts)))


def _scored(row: Row) -> Iterator[Pair | str]:
    """Pairs of different scores, whose difference is the margin."""
    prompt, texts, scores = prompt_of(row), responses_of(row), scores_of(row)
    for i, j in combinations(sorted(range(len(texts)), key=lambda i: -scores[i]), 2):
        gap = scores[i] - scores[j]
        yield contest(prompt, texts[i], texts[j], gap) if gap else "tie"


def scores_of(row: Row) -> list[float]:
    """A number for each of the responses."""
    scores, n = row.get("scores"), len(responses_of(row))
    expect(
        "scores",
        scores,
        f"{n} numbers, the score of each response",
        lambda v: isinstance(v, list) and len(v) == n and all(map(is_number, v)),
    )
    return list(map(float, scores))


def _order_of_ranks(row: Row, n: int) -> list[list[int]]:
    ranks = row.get("rank")
    expect(
        "rank",
        ranks,
        f"{n} numbers, the rank of each response",
        lambda v: isinstance(v, list) and len(v) == n and all(map(is_number, v)),
    )
    return [[i for i in range(n) if ranks[i] == rank] for rank in sorted(set(ranks))]


def _order(row: Row, n: int) -> list[list[int]]:
    given: Any = row.get("ranking")
    groups = given if isinstance(given, list) else []
    order = [group if isinstance(group, list) else [group] for group in groups]
    numbers = [i for group in order for i in group]
    if not all(type(i) is int for i in numbers) or sorted(numbers) != list(range(n)):
        raise DataError(
            f'field "ranking" must be the numbers 0 to {n - 1} of the responses, best first; '
            'write the rank of each response as "rank"'
        )
    return [group for group in order if group]
