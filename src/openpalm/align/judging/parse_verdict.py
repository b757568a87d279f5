"""Parses a judge's reply into a verdict: the first label, the second label, or none.

Judges write "A", "[[A]]", "Answer: B", JSON, or reason first. A label must be a word of its own; a
reply that mentions both labels must use a form that decides, like "Answer: B". An unclear reply is
no verdict, because a guess would become training data.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

Labels = tuple[str, str]

_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_THOUGHT_END = re.compile(r".*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_THOUGHT_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"^\s*```\w*\s*(.*?)\s*```\s*$", re.DOTALL)
_NAMED = ("verdict", "answer", "choice", "winner", "preferred", "preference", "better", "label")
_UNCLEAR = re.compile(
    r"\b(?:not|neither|nor|worse|tie|equal|equally|both|cannot|unsure)\b|n't\b", re.IGNORECASE
)
_AFTER_A_NAME = (
    r"(?=\s+(?:is|was|wins|follows|does|has|because|since|seems|better)\b|\s*(?![\sa-z]))"
)
"""What may follow the label A; before any other word, "A" is an article."""


def parse_verdict(reply: str, labels: Labels) -> int | None:
    """0 or 1, the number of the label that the reply names; None where it names none."""
    text = _THOUGHT_END.sub("", _THOUGHT.sub("", reply))
    if _THOUGHT_OPEN.search(text):  # cut off while reasoning
        return None
    if fenced := _FENCE.match(text):
        text = fenced[1]
    # Short replies with decoration, such as **A** or (a).
    bare = text.strip().strip("()[]{}.,:;!*_\"'`").strip()
    if (whole := _index(bare, labels)) is not None:
        return whole
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _in_words(text, labels)
    return _in_json(value, labels)


def _index(word: Any, labels: Labels) -> int | None:
    """The number of the label that equals the word, ignoring case."""
    same = [isinstance(word, str) and word.strip().casefold() == x.casefold() for x in labels]
    return same.index(True) if any(same) else None


def _in_json(value: Any, labels: Labels) -> int | None:
    """From a key with a usual name, or from the only value that is a label."""
    if not isinstance(value, dict):
        return parse_verdict(value, labels) if isinstance(value, str) else None
    lower = {str(key).casefold(): item for key, item in value.items()}
    for name in _NAMED:
        if isinstance(value_of_name := lower.get(name), str):
            return parse_verdict(value_of_name, labels)
    found = {_index(item, labels) for item in value.values()} - {None}
    return found.pop() if len(found) == 1 else None


def _in_words(text: str, labels: Labels) -> int | None:
    for decided in (_decided_by_form(text, labels), _words(text, labels)):
        found = list(decided)
        if found:
            return found[-1] if len(set(found)) == 1 else None
    return None


def _decided_by_form(text: str, labels: Labels) -> Iterator[int]:
    """Labels that the text states as its verdict: [[A]], "Answer: A", "I choose A"."""
    label, flags = _alternatives(labels)
    dressed = rf"[\s*_`\"'(\[]*(?P<label>{label})\b"
    forms = (
        rf"\[\[\s*(?P<label>{label})\s*\]\]",
        rf"\\boxed\{{\s*(?:\\text\{{)?\s*(?P<label>{label})\b",
        rf"(?i:answer|verdict|choice|winner|decision|judge?ment|preference)[*_`\"']*\s*(?::|=|(?i:is))"
        rf"\s*(?i:answer|option|response|assistant)?{dressed}{_AFTER_A_NAME}",
        rf"(?i:choose|pick|select|prefer)\s+(?i:answer|option|response|assistant)?{dressed}"
        rf"{_AFTER_A_NAME}",
        rf"(?P<label>\b{label})\s+(?i:is|was)\s+(?i:clearly\s+)?(?i:the\s+)?(?i:better|best)\b",
    )
    for form in forms:
        found = [_index(m["label"], labels) for m in re.finditer(form, text, flags)]
        if found:
            yield from (i for i in found if i is not None)
            return
    first = re.match(rf"\W*(?P<label>{label})\b[\s*_`\"')\]]*(?:[,.;!\n]|$)", text, flags)
    if first and (index := _index(first["label"], labels)) is not None:
        yield index


def _words(text: str, labels: Labels) -> Iterator[int]:
    """Labels that the text mentions as words, if no word such as "not" makes them unclear."""
    if _UNCLEAR.search(text):
        return
    label, flags = _alternatives(labels)
    for m in re.finditer(rf"(?<![\w'])(?P<label>{label})\b(?!'){_AFTER_A_NAME}", text, flags):
        if (index := _index(m["label"], labels)) is not None:
            yield index


def _alternatives(labels: Labels) -> tuple[str, re.RegexFlag]:
    """Single letters must be capitals: "a" is an article."""
    pattern = "(?:" + "|".join(map(re.escape, labels)) + ")"
    letters = all(len(label) == 1 for label in labels)
    return pattern, re.RegexFlag(0) if letters else re.IGNORECASE
