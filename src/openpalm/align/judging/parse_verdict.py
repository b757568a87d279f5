"""Reading a judge's verdict: which of two labels a reply names, or that it names none.

Judges write "A", "[[A]]", "Answer: B", JSON, or reason first. A label counts as a word of its own,
and where both are mentioned only in a form that decides. What is not clear is no verdict: a
judgement that was not made must not become training data.
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
"""What may follow the label A, which is an article before any other word."""


def verdict(reply: str, labels: Labels) -> int | None:
    """0 or 1, the label that the reply decides for; None where it decides for none."""
    text = _THOUGHT_END.sub("", _THOUGHT.sub("", reply))
    if _THOUGHT_OPEN.search(text):  # cut off before the verdict
        return None
    if fenced := _FENCE.match(text):
        text = fenced[1]
    bare = text.strip().strip("()[]{}.,:;!*_\"'`").strip()
    if (whole := _index(bare, labels)) is not None:
        return whole
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _in_words(text, labels)
    return _in_json(value, labels)


def _index(word: Any, labels: Labels) -> int | None:
    """Which label the word is, in capitals or not."""
    same = [isinstance(word, str) and word.strip().casefold() == x.casefold() for x in labels]
    return same.index(True) if any(same) else None


def _in_json(value: Any, labels: Labels) -> int | None:
    """Of an object's verdict by its usual names, else by the only values that are labels."""
    if not isinstance(value, dict):
        return verdict(value, labels) if isinstance(value, str) else None
    lower = {str(key).casefold(): item for key, item in value.items()}
    for name in _NAMED:
        if isinstance(said := lower.get(name), str):
            return verdict(said, labels)
    found = {_index(item, labels) for item in value.values()} - {None}
    return found.pop() if len(found) == 1 else None


def _in_words(text: str, labels: Labels) -> int | None:
    for decided in (_decided_by_form(text, labels), _words(text, labels)):
        found = list(decided)
        if found:
            return found[-1] if len(set(found)) == 1 else None
    return None


def _decided_by_form(text: str, labels: Labels) -> Iterator[int]:
    """Where the text says that a label is its verdict: [[A]], "Answer: A", "I choose A"."""
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
    """The labels that stand in the text as words, where no other word takes them back."""
    if _UNCLEAR.search(text):
        return
    label, flags = _alternatives(labels)
    for m in re.finditer(rf"(?<![\w'])(?P<label>{label})\b(?!'){_AFTER_A_NAME}", text, flags):
        if (index := _index(m["label"], labels)) is not None:
            yield index


def _alternatives(labels: Labels) -> tuple[str, re.RegexFlag]:
    """Single letters count as capitals only: "a" is an article."""
    pattern = "(?:" + "|".join(map(re.escape, labels)) + ")"
    letters = all(len(label) == 1 for label in labels)
    return pattern, re.RegexFlag(0) if letters else re.IGNORECASE
