"""Rows of each export format from preference records.

Formats hold messages, not texts, wherever the format allows it, so that the readers of data/rows,
`datasets` and TRL read back the same turns. A text format can misread some turns; such a record is
left out with its reason. Every row but the record itself has `record_ids` and `author_kind`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from openpalm.data.rows.fields import Row
from openpalm.data.rows.messages import Messages, stripped
from openpalm.data.rows.preferences import (
    ALONE,
    LabelledCompletion,
    Pair,
    Preference,
    demonstrations_of,
    labelled_completions_of,
    mean_rating,
    pair_of_ratings,
    pairs_of,
)
from openpalm.data.rows.readers.demonstrations import (
    check_demonstration,
    completion_row_to_conversation,
)
from openpalm.data.rows.readers.pairs import row_to_pair
from openpalm.errors import DataError

Fields = dict[str, Any]


class Altered(NamedTuple):
    """A row that does not hold its record as it is."""

    row: Fields
    change: str


Made = Fields | Altered | str
"""a row, or the reason why there is none"""
_SHAREGPT_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_HH_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_MISREAD = "a text that this format would read as other turns"


class Format(NamedTuple):
    """An export format."""

    title: str
    """describes the rows, for a page or a message"""
    of_one: Callable[[Preference], Iterator[Made]]
    """the rows of one record"""
    of_ratings: Callable[[list[Preference]], Iterator[tuple[list[Preference], Made]]] | None = None
    """rows of several comparable ratings (see preferences.rating_group), with their records"""


def _records(p: Preference) -> Iterator[Made]:
    yield p.to_json()


# Pairs.


def _pair_format(title: str, write: Callable[[Pair], Iterable[Made]]) -> Format:
    def of_one(p: Preference) -> Iterator[Made]:
        for pair in pairs_of(p):
            yield from [pair] if isinstance(pair, str) else write(pair)

    def of_ratings(group: list[Preference]) -> Iterator[tuple[list[Preference], Made]]:
        if len(group) == 1:
            yield group, ALONE
        for first, second in combinations(group, 2):
            pair = pair_of_ratings(first, second)
            for made in [pair] if isinstance(pair, str) else write(pair):
                yield [first, second], made

    return Format(title, of_one, of_ratings)


def _explicit(pair: Pair) -> Iterator[Made]:
    sides = {"chosen": _turns(pair.chosen), "rejected": _turns(pair.rejected)}
    yield {"prompt": _turns(pair.prompt), **sides, **_margin(pair)}


def _whole(pair: Pair) -> Iterator[Made]:
    chosen, rejected = pair.prompt + pair.chosen, pair.prompt + pair.rejected
    yield {"chosen": _turns(chosen), "rejected": _turns(rejected), **_margin(pair)}


def _hh(pair: Pair) -> Iterator[Made]:
    turns = pair.prompt + pair.chosen + pair.rejected
    if any(m.role == "system" for m in turns):
        yield "a system turn, which HH texts cannot hold"
        return
    sides = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
    chosen, rejected = map(_hh_text, sides)
    row = {"chosen": chosen, "rejected": rejected, **_margin(pair)}
    if not _is_read_as(pair, row):
        yield _MISREAD
    elif any(m.content != m.content.strip() for m in turns):
        yield Altered(row, "white space around a turn removed, for HH texts cannot hold it")
    else:
        yield row


def _is_read_as(pair: Pair, row: Fields) -> bool:
    """Whether HH texts are read back as this pair: `Human:` in a text could start a turn."""
    try:
        read = next(iter(row_to_pair(Row(row))))
    except DataError:
        return False
    return [stripped(part) for part in read[:3]] == [stripped(part) for part in pair[:3]]


def _hh_text(messages: Messages) -> str:
    return "".join(f"\n\n{_HH_SPEAKERS[m.role]}: {m.content.strip()}" for m in messages)


def _margin(pair: Pair) -> Fields:
    return {} if pair.margin is None else {"margin": pair.margin}


# Single completions: labels, ratings, rankings, scores.


def _labels(p: Preference) -> Iterator[Made]:
    for labelled in labelled_completions_of(p):
        yield labelled if isinstance(labelled, str) else _label(labelled)


def _labels_of_pair(pair: Pair) -> Iterator[Made]:
    for side, good in ((pair.chosen, True), (pair.rejected, False)):
        yield _label(LabelledCompletion(pair.prompt, side, good))


def _label(labelled: LabelledCompletion) -> Fields:
    prompt, completion, good = labelled
    return {"prompt": _turns(prompt), "completion": _turns(completion), "label": good}


def _ratings(p: Preference) -> Iterator[Made]:
    if p.kind != "rate":
        yield f"{p.kind} gives no rating"
    elif not _rated_text(p).strip():
        yield "empty completion"
    else:
        completion = [{"role": "assistant", "content": _rated_text(p)}]
        ratings = dict(p.payload["ratings"])
        yield {"prompt": _turns(p.prompt), "completion": completion, "ratings": ratings}


def _rankings(p: Preference) -> Iterator[Made]:
    """Rankings, and comparisons as rankings of two; a comparison's strength has no field there."""
    texts = [candidate.text for candidate in p.candidates]
    match p.kind, p.payload:
        case "rank", {"order": order}:
            ranking = [list(group) for group in order]
        case "compare", {"better": i, "worse": j}:
            texts, ranking = [texts[i], texts[j]], [[0], [1]]
        case "compare", {"tie": [i, j]}:
            texts, ranking = [texts[i], texts[j]], [[0, 1]]
        case "compare", _:
            yield "both bad"
            return
        case _:
            yield f"{p.kind} gives no ranking"
            return
    yield {"prompt": _turns(p.prompt), "responses": texts, "ranking": ranking}


def _no_scores(p: Preference) -> Iterator[Made]:
    yield f"{p.kind} gives no score"


def _scores(group: list[Preference]) -> Iterator[tuple[list[Preference], Made]]:
    """The mean over the axes of each completion that one author rated."""
    if len(group) == 1:
        yield group, ALONE
        return
    texts = [_rated_text(p) for p in group]
    scores = [float(mean_rating(p)) for p in group]
    yield group, {"prompt": _turns(group[0].prompt), "responses": texts, "scores": scores}


def _rated_text(p: Preference) -> str:
    return p.candidates[p.payload["candidate"]].text


# Demonstrations.


def _conversations(p: Preference, write: Callable[[Messages], Made]) -> Iterator[Made]:
    for messages in demonstrations_of(p):
        checked = messages if isinstance(messages, str) else check_demonstration(messages)
        yield checked if isinstance(checked, str) else write(checked)


def _demonstration_format(title: str, write: Callable[[Messages], Made]) -> Format:
    return Format(title, lambda p: _conversations(p, write))


def _sharegpt(messages: Messages) -> Fields:
    turns = []
    for message in messages:
        turn = message.to_json()
        speaker = _SHAREGPT_SPEAKERS[turn.pop("role")]
        turns.append({"from": speaker, "value": turn.pop("content"), **turn})
    return {"conversations": turns}


def _completion(messages: Messages) -> Made:
    if [m.role for m in messages] != ["user", "assistant"]:
        return "several turns or a system turn, which prompt and completion texts cannot hold"
    question, answer = messages
    return _checked_texts({"prompt": question.content, "completion": answer.content}, messages)


def _alpaca(messages: Messages) -> Made:
    roles = [m.role for m in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return "several turns, which Alpaca rows cannot hold"
    *system, question, answer = messages
    texts = {"instruction": question.content, "input": "", "output": answer.content}
    if system:
        texts["system"] = system[0].content
    return _checked_texts(texts, messages)


def _checked_texts(row: Fields, messages: Messages) -> Made:
    """The row, if it is read back as these messages."""
    try:
        read = next(iter(completion_row_to_conversation(Row(row))))
    except DataError:
        return _MISREAD
    return row if read == messages else _MISREAD


def _turns(messages: Messages) -> list[Fields]:
    return [message.to_json() for message in messages]


RECORDS = "records"
FORMATS: dict[str, Format] = {
    RECORDS: Format("preference records, everything kept", _records),
    "pairs": _pair_format("prompt, chosen, rejected as messages (TRL's DPO)", _explicit),
    "conversations": _pair_format("chosen and rejected as whole conversations", _whole),
    "hh": _pair_format("chosen and rejected as Anthropic HH texts", _hh),
    "kto": Format("prompt, completion, label of thumbs, ratings and both-bad (TRL's KTO)", _labels),
    "kto-pairs": _pair_format(
        "prompt, completion, label: the better of each pair true, the worse false", _labels_of_pair
    ),
    "ratings": Format("prompt, completion, ratings by axis", _ratings),
    "rankings": Format("prompt, responses, ranking (best first; a group is a tie)", _rankings),
    "scores": Format("prompt, responses, scores (mean ratings of one author)", _no_scores, _scores),
    "messages": _demonstration_format(
        "messages of edits and demonstrations (SFT)", lambda m: {"messages": _turns(m)}
    ),
    "sharegpt": _demonstration_format("ShareGPT conversations (SFT)", _sharegpt),
    "prompt-completion": _demonstration_format("prompt and completion texts (SFT)", _completion),
    "alpaca": _demonstration_format("instruction, input, output (SFT)", _alpaca),
}
"""the .jsonl formats by name; exports/stream.py adds the table of judgements, `csv`"""
