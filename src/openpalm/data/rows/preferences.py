"""The preference record, one judgement by a person or a program, and its conversion to examples.

A record becomes pairs (DPO, reward models), ties, ratings, labelled completions (KTO) or
demonstrations (SFT). Everything unused is counted with its reason.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields
from datetime import datetime
from fractions import Fraction
from itertools import chain, combinations, product
from math import comb
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from openpalm.base.console import shown
from openpalm.base.typed import at, expect, is_number
from openpalm.data.rows.messages import Messages, assistant_turn, check_prompt, parse_messages
from openpalm.data.rows.payloads import PAYLOADS, Kind, is_payload, is_text
from openpalm.data.rows.read_result import ReadResult, collect_results
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

AuthorKind = Literal["person", "model", "simulated"]
T = TypeVar("T")
ALONE = "no other rating to compare with"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A completion to judge; `checkpoint` (a hash) and `sampling` say how it was generated."""

    text: str
    checkpoint: str | None = None
    sampling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_fields(self)

    def to_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in _NAMES[Candidate]}
        return row if self.sampling is None else row | {"sampling": deepcopy(self.sampling)}


@dataclass(frozen=True, slots=True)
class Preference:
    """One judgement of completions of `prompt`. Raises DataError naming an invalid field.

    PAYLOADS shows the `payload` of each kind; it numbers the candidates from 0. `created` is
    ISO 8601 with a time zone; `supersedes` is the id of the record that this one replaces. The
    author is a person, a model, or a simulated labeler (a program that stands for a person in
    tests and in planning). Training reads all three alike; who counts them must keep them apart.
    """

    id: str
    prompt: Messages
    candidates: tuple[Candidate, ...]
    kind: Kind
    payload: dict[str, Any]
    author: str
    author_kind: AuthorKind
    created: str
    elapsed_s: float | None = None
    guideline_version: str | None = None
    supersedes: str | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        check_prompt(self.prompt)
        if not is_payload(self.kind, self.payload, len(self.candidates)):
            raise DataError(
                f'field "payload" of this {self.kind} is {self.payload!a:.200}; it must be '
                f"{PAYLOADS[self.kind]}, of {len(self.candidates)} candidates numbered from 0"
            )
        if self.supersedes == self.id:
            raise DataError('field "supersedes" is the record\'s own id; name another record')

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; `from_json` of it equals the record."""
        row = {name: getattr(self, name) for name in _NAMES[Preference]}
        candidates = [candidate.to_json() for candidate in self.candidates]
        prompt = [message.to_json() for message in self.prompt]
        return row | {
            "prompt": prompt,
            "candidates": candidates,
            "payload": deepcopy(self.payload),
        }

    @classmethod
    def from_json(cls, obj: object, where: str = "") -> "Preference":
        """Parses a JSON object; a DataError begins with `where` ("path:line"), if it is given."""
        return at(where, _parse_record, obj) if where else _parse_record(obj)


class Pair(NamedTuple):
    """A preference pair: two completions of a prompt, each a list of turns by the assistant.

    `margin` says how much better `chosen` is: the strength of a comparison (1 to 3), the gap of
    two ratings (1 to 4), or the file's own number; None if unknown.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None


class Tie(NamedTuple):
    """Two completions of a prompt, judged equally good; their order has no meaning."""

    prompt: Messages
    first: Messages
    second: Messages


class Rating(NamedTuple):
    """The rating of a completion on one axis ("" if the axis has no name)."""

    prompt: Messages
    completion: Messages
    axis: str
    value: float
    """an integer from 1 to 5 in a preference record, any number in other rows"""


class LabelledCompletion(NamedTuple):
    """A completion labelled good or bad by itself; KTO trains on these."""

    prompt: Messages
    completion: Messages
    good: bool


def pairs_from_preferences(preferences: Iterable[Preference]) -> ReadResult[Pair]:
    """Pairs for DPO and reward models from compare, rank (between groups), edit and rate.

    Two ratings make a pair if one author rated completions of one prompt on the same axes under
    the same guidelines, and the means over the axes are at least 1 apart.
    """
    return _convert(preferences, pairs_of, _pairs_of_ratings)


def ties_from_preferences(preferences: Iterable[Preference]) -> ReadResult[Tie]:
    """The ties of compare and rank, for agreement figures; `pairs_from_preferences` skips them."""
    return _convert(preferences, _ties_of)


def ratings_from_preferences(preferences: Iterable[Preference]) -> ReadResult[Rating]:
    """The ratings of rate, one for each axis."""
    return _convert(preferences, _ratings_of)


def labelled_completions_from_preferences(
    preferences: Iterable[Preference],
) -> ReadResult[LabelledCompletion]:
    """Labels of thumb, both_bad and rate; a mean over the axes above 3 is good, below 3 bad."""
    return _convert(preferences, labelled_completions_of)


def demonstrations_from_preferences(preferences: Iterable[Preference]) -> ReadResult[Messages]:
    """Conversations for SFT from edit and write."""
    return _convert(preferences, demonstrations_of)


def _convert(
    preferences: Iterable[Preference],
    of_one: Callable[[Preference], Iterable[T | str]],
    of_all: Callable[[list[Preference]], Iterable[T | str]] | None = None,
) -> ReadResult[T]:
    """Converts the records in force; the place of an example is the id of its record.

    `of_all` adds examples that need several records, and have no place.
    """
    preferences = list(preferences)
    superseded = {p.supersedes for p in preferences}
    # The first record with an id counts; a file that was appended to itself repeats all ids.
    by_id = {p.id: p for p in reversed(preferences) if p.id not in superseded}
    in_force = list(reversed(by_id.values()))
    found: list[tuple[str, T | str]] = [
        (p.id, "superseded") for p in preferences if p.id in superseded
    ]
    found += [(p.id, "repeated id") for p in preferences if by_id.get(p.id, p) is not p]
    found += [(p.id, example) for p in in_force for example in of_one(p)]
    found += [("", example) for example in (of_all(in_force) if of_all else ())]
    return collect_results(found)


def pairs_of(p: Preference) -> Iterator[Pair | str]:
    texts = [candidate.text for candidate in p.candidates]
    match p.kind, p.payload:
        case "compare", {"better": i, "worse": j, "strength": strength}:
            yield pair_or_reason(p.prompt, texts[i], texts[j], strength)
        case "compare", payload:
            yield "tie" if "tie" in payload else "both bad"
        case "rank", {"order": order}:
            yield from pairs_from_ranking(p.prompt, texts, order)
        case "edit", {"candidate": i, "text": text}:
            yield pair_or_reason(p.prompt, text, texts[i])
        case "rate", _:  # see _pairs_of_ratings
            pass
        case _:
            yield f"{p.kind} gives no pair"


def _pairs_of_ratings(preferences: list[Preference]) -> Iterator[Pair | str]:
    """Pairs of completions that were rated one by one."""
    rated: defaultdict[Any, list[Preference]] = defaultdict(list)
    for p in preferences:
        if p.kind == "rate":
            rated[rating_group(p)].append(p)
    for group in rated.values():
        if len(group) == 1:
            yield ALONE
        for first, second in combinations(group, 2):
            yield pair_of_ratings(first, second)


def rating_group(p: Preference) -> tuple[Any, ...]:
    """Ratings are comparable if their groups are equal.

    That is, within one prompt, author, set of axes and guideline version.
    """
    axes = frozenset(p.payload["ratings"])
    return p.prompt, p.author, p.author_kind, p.guideline_version, axes


def pair_of_ratings(first: Preference, second: Preference) -> Pair | str:
    """The pair of two comparable ratings, or the reason why they make none."""
    rated = [(mean_rating(p), p.candidates[p.payload["candidate"]].text) for p in (first, second)]
    (low, worse), (high, better) = sorted(rated)
    gap = high - low
    return pair_or_reason(first.prompt, better, worse, gap) if gap >= 1 else "rating gap below 1"


def pairs_from_ranking(
    prompt: Messages, texts: list[str], order: list[list[int]]
) -> Iterator[Pair | str]:
    """Pairs of completions from different groups of `order`, best group first."""
    for i, j in chain(*(product(*groups) for groups in combinations(order, 2))):
        yield pair_or_reason(prompt, texts[i], texts[j])
    yield from ["tie"] * sum(comb(len(group), 2) for group in order)


def pair_or_reason(prompt: Messages, better: str, worse: str, margin: Any = None) -> Pair | str:
    """The pair of two texts, or the reason why they make none."""
    if not (better.strip() and worse.strip()):
        return "empty completion"
    if better.strip() == worse.strip():
        return "equal completions"
    margin = None if margin is None else float(margin)
    return Pair(prompt, assistant_turn(better), assistant_turn(worse), margin)


def _ties_of(p: Preference) -> Iterator[Tie | str]:
    match p.kind, p.payload:
        case "compare", {"tie": [i, j]}:
            tied = [(i, j)]
        case "rank", {"order": order}:
            tied = chain.from_iterable(combinations(group, 2) for group in order)
        case _:
            yield f"{p.kind} gives no tie"
            return
    for i, j in tied:
        first, second = (assistant_turn(p.candidates[k].text) for k in (i, j))
        yield Tie(p.prompt, first, second)


def _ratings_of(p: Preference) -> Iterator[Rating | str]:
    if p.kind != "rate":
        yield f"{p.kind} gives no rating"
        return
    completion = assistant_turn(p.candidates[p.payload["candidate"]].text)
    for axis, value in p.payload["ratings"].items():
        yield Rating(p.prompt, completion, axis, value)


def labelled_completions_of(p: Preference) -> Iterator[LabelledCompletion | str]:
    match p.kind, p.payload:
        case "thumb", {"candidate": i, "up": good}:
            labelled = [i]
        case "compare", {"both_bad": labelled}:
            good = False
        case "rate", {"candidate": i} if mean_rating(p) != 3:
            labelled, good = [i], mean_rating(p) > 3
        case "rate", _:
            yield "neither good nor bad"
            return
        case _:
            yield f"{p.kind} gives no labelled completion"
            return
    for text in (p.candidates[i].text for i in labelled):
        completion = LabelledCompletion(p.prompt, assistant_turn(text), good)
        yield completion if text.strip() else "empty completion"


def demonstrations_of(p: Preference) -> Iterator[Messages | str]:
    if p.kind in ("edit", "write"):
        yield p.prompt + assistant_turn(p.payload["text"])
    else:
        yield f"{p.kind} gives no demonstration"


def mean_rating(p: Preference) -> Fraction:
    """The mean over the axes. Exact: in floating point 14/3 - 11/3 is below 1."""
    axes = p.payload["ratings"]
    return Fraction(sum(axes.values()), len(axes))


# Validation of records.


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_plain(value: Any) -> bool:
    """Whether a JSON round trip preserves this object: no tuple, no NaN, only text keys."""
    try:
        return isinstance(value, dict) and json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _is_tuple(values: Any, of: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, of) for value in values)


_TEXT = ("a text that is not blank", is_text)
_TEXT_OR_NULL = ("a text or null", lambda v: v is None or is_text(v))
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
    "author_kind": ("person, model or simulated", lambda v: v in get_args(AuthorKind)),
    "created": ("a time with its zone, as 2026-01-31T12:00:00Z", _is_time),
    "elapsed_s": ("seconds or null", lambda v: v is None or (is_number(v) and v >= 0)),
    "guideline_version": _TEXT_OR_NULL,
    "supersedes": _TEXT_OR_NULL,
}


# dataclasses.fields makes a new tuple at each call.
_NAMES: dict[type, tuple[str, ...]] = {
    of: tuple(field.name for field in fields(of)) for of in (Candidate, Preference)
}


def _check_fields(record: Candidate | Preference) -> None:
    for name in _NAMES[type(record)]:
        wanted, right = _FIELDS[name]
        expect(name, getattr(record, name), wanted, right)


def _parse_record(obj: object) -> Preference:
    row = _known_fields(obj, Preference)
    row["prompt"] = parse_messages(row["prompt"], "prompt")
    if isinstance(row["candidates"], list):
        row["candidates"] = tuple(
            at(
                f'field "candidates[{i}]"',
                lambda c: Candidate(**_known_fields(c, Candidate)),
                candidate,
            )
            for i, candidate in enumerate(row["candidates"])
        )
    return Preference(**row)


def _known_fields(obj: object, of: type[Candidate | Preference]) -> dict[str, Any]:
    names = _NAMES[of]
    if not isinstance(obj, dict):
        raise DataError(f"is a {type(obj).__name__}; it must be an object with {', '.join(names)}")
    if unknown := obj.keys() - names:
        raise DataError(f"field {shown(min(unknown))} is unknown; leave it out")
    return {name: obj.get(name) for name in names}
