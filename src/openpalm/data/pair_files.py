"""Pairs of answers from files, in the forms that people keep them in (data/forms.py)."""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from openpalm.data.conversation import Message
from openpalm.data.forms import (
    EXPLICIT,
    HH,
    RANKING,
    RESPONSES,
    TEXTS,
    WHOLE,
    answer_of,
    check_answer,
    form_of,
    hh_messages,
    name_of,
    prompt_of,
    read_forms,
    stripped,
)
from openpalm.data.preferences import (
    Messages,
    Pair,
    Tie,
    Usable,
    check_prompt,
    expect,
    is_number,
    messages_of,
    pairs,
    ranked,
    says,
    ties,
)
from openpalm.errors import DataError


def read_pairs(path: str | Path) -> Usable[Pair]:
    """Pairs of a .jsonl or .jsonl.gz file.

    Forms: Preference records; prompt, chosen, rejected (texts or messages; the answers may
    repeat the prompt); chosen and rejected alone, whose common beginning is the prompt: message
    lists, Anthropic HH texts, or plain texts, parted at a white space; prompt, responses and
    `rank` (of each response, lower is better, equal is a tie) or `ranking` (numbers of the
    responses from 0, best first; those in a list of their own are tied). A pair may have a
    `margin`. Raises DataError with line, field and remedy.
    """
    makers = dict.fromkeys((EXPLICIT, HH, TEXTS, WHOLE), row_pair) | {RANKING: _ranking}
    return read_forms(path, "pair", makers, pairs)


def read_ties(path: str | Path) -> list[Tie]:
    """The ties of a file that `read_pairs` reads; only Preference records can have any."""

    def none(row: dict[str, Any]) -> Iterator[Tie]:
        return iter(())

    forms = (EXPLICIT, HH, TEXTS, WHOLE, RANKING)
    return read_forms(path, "pair", dict.fromkeys(forms, none), ties).items


def row_pair(row: dict[str, Any]) -> Iterator[Pair]:
    sides = ("chosen", "rejected")
    for name in sides:
        if row.get(name) is None:
            raise DataError(
                f'field "{name}" is missing; write "prompt", "chosen" and "rejected", '
                "or both answers with the conversation before them"
            )
    form = form_of(row)
    if form == EXPLICIT:
        prompt = prompt_of(row)
        chosen, rejected = (answer_of(row, name, prompt) for name in sides)
    elif form == TEXTS:
        prompt, chosen, rejected = _part_texts(row["chosen"], row["rejected"])
    else:
        parse = hh_messages if form == HH else messages_of
        prompt, chosen, rejected = _part(*(parse(row[side], side) for side in sides))
    if stripped(chosen) == stripped(rejected):
        raise DataError('field "chosen" equals "rejected"; mend this line or leave it out')
    if not prompt:
        raise DataError(
            'field "prompt" is missing, and the answers have no common beginning; add it'
        )
    check_prompt(prompt)
    check_answer(chosen, "chosen")
    check_answer(rejected, "rejected")
    margin = row.get("margin")
    expect("margin", margin, "a number or null", lambda v: v is None or is_number(v))
    yield Pair(prompt, chosen, rejected, None if margin is None else float(margin))


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
    return prompt, says(chosen[n:].strip()), says(rejected[n:].strip())


def _ranking(row: dict[str, Any]) -> Iterator[Pair | str]:
    field = name_of(row, RESPONSES)
    texts = row[field]
    wanted = "a list of two or more texts"
    expect(field, texts, wanted, lambda v: isinstance(v, list) and len(v) > 1)
    for i, text in enumerate(texts):
        expect(f"{field}[{i}]", text, "a text", lambda v: isinstance(v, str))
    order = _order_of_ranks if row.get("ranking") is None else _order
    return ranked(prompt_of(row), texts, order(row, len(texts)))


def _order_of_ranks(row: dict[str, Any], n: int) -> list[list[int]]:
    ranks = row["rank"]
    expect(
        "rank",
        ranks,
        f"{n} numbers, the rank of each response",
        lambda v: isinstance(v, list) and len(v) == n and all(map(is_number, v)),
    )
    return [[i for i in range(n) if ranks[i] == rank] for rank in sorted(set(ranks))]


def _order(row: dict[str, Any], n: int) -> list[list[int]]:
    given = row["ranking"]
    groups = given if isinstance(given, list) else []
    order = [group if isinstance(group, list) else [group] for group in groups]
    numbers = [i for group in order for i in group]
    if not all(type(i) is int for i in numbers) or sorted(numbers) != list(range(n)):
        raise DataError(
            f'field "ranking" must be the numbers 0 to {n - 1} of the responses, best first; '
            'write the rank of each response as "rank"'
        )
    return [group for group in order if group]
