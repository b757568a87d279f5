"""Preference records from the answers of an annotation, and a reason for every answer without one.

Questions are free in the tools, so their form and their name say what they ask: a side or a label
that names a completion compares, labels such as `good` are thumbs, numbers from 1 to 5 are ratings
with the question as their axis, and a text edits a completion if the question says so.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from openpalm.base.console import shown
from openpalm.base.typed import is_number
from openpalm.data.rows.imports.task_fields import Content, normal
from openpalm.data.rows.imports.tasks import IGNORE, Annotation, Answer, Roles
from openpalm.data.rows.payloads import Kind
from openpalm.data.rows.preferences import Candidate, Preference

# Labels without case and punctuation (see task_fields.normal).
TIE = frozenset(("tie", "tied", "equal", "equallygood", "same", "draw", "bothgood", "nopreference"))
BOTH_BAD = frozenset(("bothbad", "neither", "allbad", "equallybad", "bothwrong", "noneofthem"))
GOOD = frozenset(
    ("good", "thumbsup", "thumbup", "correct", "accept", "accepted", "like", "helpful")
)
BAD = frozenset(
    (
        *("bad", "thumbsdown", "thumbdown", "incorrect", "wrong", "reject", "rejected"),
        *("dislike", "unhelpful"),
    )
)
# `yes` to "Is it rude?" praises nothing: these count only where Roles call the question a thumb.
_YES, _NO = frozenset(("yes", "true", "up", "1")), frozenset(("no", "false", "down", "0"))
_COMMENT = re.compile(r"comment|reason|note|explanation|rationale|why|justification|feedback")
_EDIT = re.compile(
    r"(?:^|[ _.-])edit|corrected|correction|improved|improvement|rewrit|revised|revision|fixed"
    r"|ideal|better[ _.-]?(?:response|completion|answer|output)"
)
_WRITE = re.compile(r"demonstration|write|response|completion|answer|output|reply|generation")
# A label of one letter may be a grade: it names a completion only in an answer to such a question.
_COMPARES = re.compile(r"better|best|prefer|choice|choose|chosen|winner|which|compar|pick|select")

Payload = dict[str, Any]


class Judged(NamedTuple):
    kind: Kind
    payload: Payload


def records_of(
    task_id: str,
    content: Content,
    annotation: Annotation,
    roles: Roles,
    created: str,
) -> Iterator[Preference | str]:
    """The records of one annotation, or reasons. Ids are the same each time a file is read."""
    candidates = tuple(Candidate(choice.text) for choice in content.choices)
    judged: list[Judged | str] = []
    ratings: dict[int, dict[str, int]] = {}
    for answer in annotation.answers:
        found = _rating(answer, content, roles)
        if found is None:
            judged += _judge(answer, content, roles)
        elif isinstance(found, str):
            judged.append(found)
        else:
            candidate, axis, value = found
            if axis in ratings.setdefault(candidate, {}):
                judged.append(f"a second rating of {shown(axis)} of one completion")
            ratings[candidate].setdefault(axis, value)
    for candidate, axes in ratings.items():
        judged.append(Judged("rate", {"ratings": axes, "candidate": candidate}))
    if not annotation.answers:
        judged.append("an annotation without an answer")
    # The time of a whole annotation counts once, whatever the number of its records.
    elapsed_s = annotation.elapsed_s
    for number, item in enumerate(judged):
        if isinstance(item, str):
            yield item
            continue
        yield Preference(
            id=f"{task_id}:{annotation.id}:{number}",
            prompt=content.prompt,
            candidates=candidates,
            kind=item.kind,
            payload=item.payload,
            author=annotation.author,
            author_kind="person",
            created=annotation.created or created,
            elapsed_s=elapsed_s,
        )
        elapsed_s = None


def _rating(answer: Answer, content: Content, roles: Roles) -> tuple[int, str, int] | str | None:
    """(candidate, axis, value) of a rating, a reason, or None if the answer is no rating."""
    if answer.form != "rating" or roles.questions.get(answer.question, "rate") != "rate":
        return None
    value = answer.value
    if not is_number(value) or value != int(value) or not 1 <= value <= 5:
        said = str(value)[:20] if is_number(value) else shown(value)
        return f"a rating of {said}; records have whole numbers from 1 to 5"
    candidate = _candidate_of(answer, content)
    if candidate is None:
        return f"question {shown(answer.question)} does not say which completion it rates"
    return candidate, _axis(answer.question, content), int(value)


def _axis(question: str, content: Content) -> str:
    """The question's name without the number of a completion: `honesty_2` rates `honesty`."""
    if len(content.choices) > 1 and content.find_in_question(question) is not None:
        return re.sub(r"[ _.-]+[0-9a-hA-H]{1,3}$", "", question) or question
    return question


def _candidate_of(answer: Answer, content: Content) -> int | None:
    named = [i for i in map(content.find, answer.about) if i is not None]
    if len(named) == 1:
        return named[0]
    if len(content.choices) == 1:
        return 0
    return content.find_in_question(answer.question)


def _judge(answer: Answer, content: Content, roles: Roles) -> Iterable[Judged | str]:
    question, kind = shown(answer.question), roles.questions.get(answer.question)
    if kind == IGNORE:
        return [f"question {question}, which is to be ignored"]
    if kind == "flag" and isinstance(answer.value, str):
        return [Judged("flag", {"candidate": None, "reason": f"{answer.question}: {answer.value}"})]
    if answer.form == "side":
        return [_side(answer, content)]
    if answer.form == "order":
        return [_order(answer, content)]
    if answer.form in ("label", "text") and isinstance(answer.value, str):
        return _label_or_text(answer, content, kind)
    return [f"answer to {question}, which no record holds"]


def _side(answer: Answer, content: Content) -> Judged | str:
    sides = [content.find(name) for name in answer.about]
    if len(sides) != 2 or None in sides or sides[0] == sides[1]:
        if len(content.choices) != 2:
            return "a comparison of fields that are not known as completions"
        sides = [0, 1]
    match normal(answer.value):
        case "left":
            return Judged("compare", {"better": sides[0], "worse": sides[1], "strength": 1})
        case "right":
            return Judged("compare", {"better": sides[1], "worse": sides[0], "strength": 1})
    return "no side is selected"


def _order(answer: Answer, content: Content) -> Judged | str:
    if answer.value is None:
        return "a ranking in buckets, which have no order"
    order = [[content.find(name) for name in group] for group in answer.value]
    numbers = [i for i in chain.from_iterable(order) if i is not None]
    if len(numbers) < sum(map(len, order)):
        return "a ranking of names that are no completions"
    if sorted(numbers) != list(range(len(content.choices))) or len(numbers) < 2:
        return "a ranking that does not have each of two or more completions once"
    return Judged("rank", {"order": order})


def _label_or_text(answer: Answer, content: Content, kind: str | None) -> Iterable[Judged | str]:
    """A label, or a text that edits or writes a completion: the tools do not always say which."""
    name, question = answer.question.casefold(), shown(answer.question)
    if kind in ("edit", "write"):
        return [_text(answer, content, kind)]
    may_be_text = answer.form == "text" and kind is None
    unread = f"text of question {question}, which no record holds"
    if may_be_text and _COMMENT.search(name):
        return [unread]
    compares = kind == "compare" or _COMPARES.search(name) is not None
    if found := list(_choice(answer.value, content, compares)):
        return found
    if may_be_text and content.choices and _EDIT.search(name):
        return [_text(answer, content, "edit")]
    if (thumb := _thumb(answer.value, content, kind)) is not None:
        return [thumb]
    if may_be_text and not content.choices and (_WRITE.search(name) or _EDIT.search(name)):
        return [_text(answer, content, "write")]
    if answer.form == "label":
        unread = f"label {shown(answer.value)} of question {question}, which no record holds"
    return [unread]


def _choice(label: str, content: Content, compares: bool) -> Iterator[Judged]:
    """What a label says of several completions."""
    count, best = len(content.choices), content.find(label)
    if count == 2 and normal(label) in TIE:
        yield Judged("compare", {"tie": [0, 1]})
    elif count == 2 and normal(label) in BOTH_BAD:
        yield Judged("compare", {"both_bad": [0, 1]})
    elif count > 1 and best is not None:
        if len(normal(label)) == 1 and not compares and label != content.choices[best].names[0]:
            return
        for other in range(count):
            if other != best:
                yield Judged("compare", {"better": best, "worse": other, "strength": 1})


def _thumb(label: str, content: Content, kind: str | None) -> Judged | None:
    """What a label says of the only completion."""
    named = normal(label)
    good, bad = (GOOD | _YES, BAD | _NO) if kind == "thumb" else (GOOD, BAD)
    if len(content.choices) != 1 or named not in good | bad:
        return None
    return Judged("thumb", {"up": named in good, "candidate": 0})


def _text(answer: Answer, content: Content, kind: str) -> Judged | str:
    if not answer.value.strip():
        return "a blank text"
    if kind == "write":
        return Judged("write", {"text": answer.value})
    candidate = _candidate_of(answer, content)
    if candidate is None:
        return f"question {shown(answer.question)} does not say which completion it edits"
    if answer.value == content.choices[candidate].text:
        return "an edit that changes nothing"
    return Judged("edit", {"candidate": candidate, "text": answer.value})
