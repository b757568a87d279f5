"""The Preference record, one judgement of a person or a model, and the training rows it becomes.

Owns what a judgement may say and which algorithm can use it. Drops nothing silently: what is of no
use is counted with its reason. Knows neither files, tokens nor losses.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from fractions import Fraction
from itertools import chain, combinations, product
from math import comb
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from openpalm.base.console import shown
from openpalm.base.typed import at, expect, is_number
from openpalm.data.rows.read_result import ReadResult, UnusableRow, collect_results
from openpalm.data.rows.turns import Messages, messages_of
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

Kind = Literal["compare", "rank", "rate", "thumb", "edit", "write", "flag"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that was judged; `checkpoint` (its hash) and `sampling` say where it came from."""

    text: str
    checkpoint: str | None = None
    sampling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, slots=True)
class Preference:
    """One judgement of answers to `prompt`; raises DataError, naming the field, if it makes none.

    `payload` has the shape that PAYLOADS shows for its kind, with candidates by number from 0.
    `created` is ISO 8601 with its zone; `supersedes` the id of the record that this one replaces.
    """

    id: str
    prompt: Messages
    candidates: tuple[Candidate, ...]
    kind: Kind
    payload: dict[str, Any]
    author: str
    author_kind: Literal["person", "model"]
    created: str
    elapsed_s: float | None = None
    guideline_version: str | None = None
    supersedes: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        check_prompt(self.prompt)
        if not _is_payload(self.kind, self.payload, len(self.candidates)):
            raise DataError(
                f'field "payload" of this {self.kind} is {self.payload!a:.200}; it must be '
                f"{PAYLOADS[self.kind]}, of {len(self.candidates)} candidates numbered from 0"
            )
        if self.supersedes == self.id:
            raise DataError('field "supersedes" is the record\'s own id; name another record')

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; `from_json` of it equals the record."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        candidates = [asdict(candidate) for candidate in self.candidates]
        prompt = [message.to_json() for message in self.prompt]
        return deepcopy(row | {"prompt": prompt, "candidates": candidates})

    @classmethod
    def from_json(cls, obj: object, where: str) -> "Preference":
        """The record of a JSON object. Raises DataError that calls it `where` ("path:line")."""
        return at(where, _record, obj)


PAYLOADS: dict[Kind, str] = {
    "compare": '{"better": i, "worse": j, "strength": 1 to 3}, {"tie": [i, j]} or '
    '{"both_bad": [i, j]}',
    "rank": '{"order": [[best ...], ..., [worst ...]]} with each of two or more candidates once',
    "rate": '{"ratings": {axis: 1 to 5}, "candidate": i}',
    "thumb": '{"up": true or false, "candidate": i}',
    "edit": '{"candidate": i, "text": the better answer}',
    "write": '{"text": a demonstration}',
    "flag": '{"candidate": i or null, "reason": a text}',
}


class Pair(NamedTuple):
    """Two answers to one prompt, each beginning and ending with an assistant turn.

    `margin` is by how much: strength of a compare (1 to 3), gap of ratings (1 to 4), the file's
    own, or None where nothing says.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None


class Tie(NamedTuple):
    """Two answers to one prompt of which neither was found better; the order says nothing."""

    prompt: Messages
    first: Messages
    second: Messages


class Rating(NamedTuple):
    prompt: Messages
    completion: Messages
    axis: str
    value: float
    """whole and 1 to 5 in a Preference record, any number in a file's own rows"""


class LabelledCompletion(NamedTuple):
    """An answer that is good or bad by itself, which is what KTO learns from."""

    prompt: Messages
    completion: Messages
    good: bool


def _export(
    use: Callable[[Iterable[Preference]], Iterator[T | str]],
) -> Callable[[Iterable[Preference]], ReadResult[T]]:
    """Hands `use` the records in force; the texts among what it yields are reasons, counted.

    The places of what comes out are the ids of the records.
    """

    def export(preferences: Iterable[Preference]) -> ReadResult[T]:
        preferences = list(preferences)
        gone = {p.supersedes for p in preferences}
        current = {p.id: p for p in reversed(preferences) if p.id not in gone}
        current = {p.id: p for p in reversed(preferences) if p.id not in gone}
        found: list[tuple[str, T | str]] = [
            (p.id, "superseded") for p in preferences if p.id in gone
        ]
        in_force = (p for p in preferences if p.id not in gone)
        found += [(p.id, "repeated id") for p in in_force if current[p.id] is not p]
        asked = ""

        def asked_for() -> Iterator[Preference]:
            """The records one by one, so that what is yielded meanwhile has a place."""
            nonlocal asked
            for record in reversed(current.values()):
                asked = record.id
                yield record
            asked = ""

        for item in use(asked_for()):
            found.append((asked, item))
        return collect_results(found)

    export.__doc__ = use.__doc__
    return export


@_export
def pairs(preferences: Iterable[Preference]) -> Iterator[Pair | str]:
    """Pairs for DPO and reward models from compare, rank (between groups), edit and rate.

    Two ratings make a pair where one author rated answers to one prompt on the same axes under
    the same guidelines, and the means over the axes are at least 1 apart.
    """
    rated: defaultdict[Any, list[tuple[Fraction, str]]] = defaultdict(list)
    for p in preferences:
        texts = [candidate.text for candidate in p.candidates]
        match p.kind, p.payload:
            case "compare", {"better": i, "worse": j, "strength": strength}:
                yield contest(p.prompt, texts[i], texts[j], strength)
            case "compare", payload:
                yield "tie" if "tie" in payload else "both bad"
            case "rank", {"order": order}:
                yield from ranked(p.prompt, texts, order)
            case "edit", {"candidate": i, "text": text}:
                yield contest(p.prompt, text, texts[i])
            case "rate", {"candidate": i, "ratings": axes}:
                key = (p.prompt, p.author, p.author_kind, p.guideline_version, frozenset(axes))
                rated[key].append((_mean(axes), texts[i]))
            case _:
                yield f"{p.kind} gives no pair"
    for (prompt, *_), group in rated.items():
        if len(group) == 1:
            yield "no other rating to compare with"
        for (low, worse), (high, better) in map(sorted, combinations(group, 2)):
            gap = high - low
            yield contest(prompt, better, worse, gap) if gap >= 1 else "rating gap below 1"


def ranked(prompt: Messages, texts: list[str], order: list[list[int]]) -> Iterator[Pair | str]:
    """Pairs of answers to one prompt, between the groups of their order from best to worst."""
    for i, j in chain(*(product(*groups) for groups in combinations(order, 2))):
        yield contest(prompt, texts[i], texts[j])
    yield from ["tie"] * sum(comb(len(group), 2) for group in order)


@_export
def ties(preferences: Iterable[Preference]) -> Iterator[Tie | str]:
    """What `pairs` leaves out as a tie, for agreement figures: from compare and rank."""
    for p in preferences:
        match p.kind, p.payload:
            case "compare", {"tie": [i, j]}:
                found = [(i, j)]
            case "rank", {"order": order}:
                found = chain.from_iterable(combinations(group, 2) for group in order)
            case _:
                yield f"{p.kind} gives no tie"
                continue
        for i, j in found:
            yield Tie(
                p.prompt, assistant_turn(p.candidates[i].text), assistant_turn(p.candidates[j].text)
            )


@_export
def ratings(preferences: Iterable[Preference]) -> Iterator[Rating | str]:
    """The scalars of rate, one for each axis."""
    for p in preferences:
        if p.kind == "rate":
            answer = assistant_turn(p.candidates[p.payload["candidate"]].text)
            yield from (Rating(p.prompt, answer, *axis) for axis in p.payload["ratings"].items())
        else:
            yield f"{p.kind} gives no rating"


@_export
def binary(preferences: Iterable[Preference]) -> Iterator[LabelledCompletion | str]:
    """Verdicts from thumb, both_bad, and rate: a mean over the axes above 3 is good, below bad."""
    for p in preferences:
        match p.kind, p.payload:
            case "thumb", {"candidate": i, "up": good}:
                judged = [i]
            case "compare", {"both_bad": judged}:
                good = False
            case "rate", {"candidate": i, "ratings": axes} if _mean(axes) != 3:
                judged, good = [i], _mean(axes) > 3
            case _:
                yield "neither good nor bad" if p.kind == "rate" else f"{p.kind} gives no verdict"
                continue
        for text in (p.candidates[i].text for i in judged):
            yield (
                LabelledCompletion(p.prompt, assistant_turn(text), good)
                if text.strip()
                else "empty completion"
            )


@_export
def demonstrations(preferences: Iterable[Preference]) -> Iterator[Messages | str]:
    """Whole conversations for SFT from edit and write."""
    for p in preferences:
        shows = p.kind in ("edit", "write")
        yield (
            p.prompt + assistant_turn(p.payload["text"])
            if shows
            else f"{p.kind} gives no demonstration"
        )


# What a record may say.


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_plain(value: Any) -> bool:
    """Whether it is an object that JSON gives back the same: no tuple, no NaN, only text keys."""
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _is_tuple(values: Any, of: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, of) for value in values)


_TEXT = ("a text that is not blank", _is_text)
_TEXT_OR_NULL = ("a text or null", lambda v: v is None or _is_text(v))
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "checkpoint": _TEXT_OR_NULL,
    "sampling": ("a JSON object or null", lambda v: v is None or _is_plain(v)),
    "id": _TEXT,
    "prompt": ("a list of messages (in Python a tuple)", lambda v: _is_tuple(v, Message)),
    "candidates": ("a list of candidates (a tuple)", lambda v: _is_tuple(v, Candidate)),
    "kind": (f"one of {', '.join(PAYLOADS)}", lambda v: v in get_args(Kind)),
    "payload": ("a JSON object", _is_plain),
    "author": _TEXT,
    "author_kind": ("person or model", lambda v: v in ("person", "model")),
    "created": ("a time with its zone, as 2026-01-31T12:00:00Z", _is_time),
    "elapsed_s": ("seconds or null", lambda v: v is None or (is_number(v) and v >= 0)),
    "guideline_version": _TEXT_OR_NULL,
    "supersedes": _TEXT_OR_NULL,
}


def _check_fields(record: Candidate | Preference) -> None:
    for field in fields(record):
        wanted, right = _FIELDS[field.name]
        expect(field.name, getattr(record, field.name), wanted, right)


def _is_payload(kind: Kind, payload: dict[str, Any], n: int) -> bool:
    def every(*numbers: Any) -> bool:
        """Whether these are numbers of candidates, none twice."""
        right = all(type(i) is int and 0 <= i < n for i in numbers)
        return right and len(set(numbers)) == len(numbers)

    match kind, payload, len(payload):
        case "compare", {"better": i, "worse": j, "strength": int(strength)}, 3:
            return every(i, j) and strength is not True and 1 <= strength <= 3
        case "compare", {"tie": [i, j]} | {"both_bad": [i, j]}, 1:
            return every(i, j)
        case "rank", {"order": [[_, *_], *_] as order}, 1:
            groups = all(isinstance(group, list) and group for group in order)
            return groups and every(*chain(*order)) and sum(map(len, order)) == n > 1
        case "rate", {"ratings": dict(axes), "candidate": i}, 2:
            whole = all(type(value) is int and 1 <= value <= 5 for value in axes.values())
            return every(i) and bool(axes) and all(map(_is_text, axes)) and whole
        case "thumb", {"up": bool(), "candidate": i}, 2:
            return every(i)
        case "edit", {"candidate": i, "text": text}, 2:
            return every(i) and _is_text(text)
        case "write", {"text": text}, 1:
            return _is_text(text)
        case "flag", {"candidate": i, "reason": reason}, 2:
            return (i is None or every(i)) and _is_text(reason)
    return False


def check_prompt(prompt: Messages) -> None:
    """Raises UnusableRow for a prompt that nobody can answer."""
    if not any(m.role == "user" and m.content.strip() for m in prompt):
        raise UnusableRow(
            "empty prompt", 'field "prompt" has no user turn with text; say what is answered'
        )
    if prompt[-1].role == "assistant":
        raise UnusableRow(
            "the prompt ends with an assistant turn",
            'field "prompt" ends with an assistant turn; end it with what is answered',
        )


def _record(obj: object) -> Preference:
    row = _row(obj, Preference)
    row["prompt"] = messages_of(row["prompt"], "prompt")
    if isinstance(row["candidates"], list):
        row["candidates"] = tuple(
            at(f'field "candidates[{i}]"', lambda c: Candidate(**_row(c, Candidate)), candidate)
            for i, candidate in enumerate(row["candidates"])
        )
    return Preference(**row)


def _row(obj: object, of: type[Candidate | Preference]) -> dict[str, Any]:
    names = [field.name for field in fields(of)]
    if not isinstance(obj, dict):
        raise DataError(f"is a {type(obj).__name__}; it must be an object with {', '.join(names)}")
    if unknown := obj.keys() - names:
        raise DataError(f"field {shown(min(unknown))} is unknown; leave it out")
    return {name: obj.get(name) for name in names}


# What a record gives.


def contest(prompt: Messages, better: str, worse: str, margin: Any = None) -> Pair | str:
    if not (better.strip() and worse.strip()):
        return "empty completion"
    if better.strip() == worse.strip():
        return "equal completions"
    return Pair(
        prompt,
        assistant_turn(better),
        assistant_turn(worse),
        None if margin is None else float(margin),
    )


def _mean(axes: dict[str, int]) -> Fraction:
    # Exact, for in floating point 14/3 - 11/3 is below 1.
    return Fraction(sum(axes.values()), len(axes))


def assistant_turn(text: str) -> Messages:
    """An answer of one turn."""
    return (Message("assistant", text),)
