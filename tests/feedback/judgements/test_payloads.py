"""Forms of every task -> payloads -> records that training reads, and back."""

import json

import pytest

from openpalm.errors import DataError
from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.payloads import form_of, payload_of
from openpalm.feedback.judgements.records import record
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Task

TEXTS = ("first", "second", "third")
COUNTS = {Task.PAIR: 2, Task.RANKING: 3, Task.DEMONSTRATION: 0}


@pytest.fixture
def open_item(project, member, make_item):
    """open_item(task, order): an assignment with this order on the screen."""

    def make(task, order=None, **fields):
        for name, value in ({"task": task} | fields).items():
            setattr(project, name, value)
        project.save()
        make_item("question", *TEXTS[: COUNTS.get(task, 1)])
        assignment = queue.next_assignment(project, member("ann"))
        if order:
            assignment.order = order
            assignment.save()
        return assignment

    return make


@pytest.mark.parametrize(
    ("task", "order", "fields", "form", "kind", "payload"),
    [
        ("pair", [0, 1], {}, {"choice": "1"}, "compare", {"better": 0, "worse": 1, "strength": 2}),
        ("pair", [1, 0], {}, {"choice": "1"}, "compare", {"better": 1, "worse": 0, "strength": 2}),
        ("pair", [1, 0], {}, {"choice": "4"}, "compare", {"better": 0, "worse": 1, "strength": 1}),
        (
            *("pair", [0, 1], {"scale": 7}, {"choice": "7"}),
            *("compare", {"better": 1, "worse": 0, "strength": 3}),
        ),
        ("pair", [1, 0], {"scale": 7}, {"choice": "4"}, "compare", {"tie": [0, 1]}),
        ("pair", [1, 0], {}, {"choice": "both_bad"}, "compare", {"both_bad": [0, 1]}),
        (
            *("ranking", [2, 0, 1], {}, {"place_0": "2", "place_1": "1", "place_2": "2"}),
            *("rank", {"order": [[0], [2, 1]]}),
        ),
        (
            *("rating", None, {"axes": ["truth", "style"]}, {"axis_0": "5", "axis_1": "2"}),
            *("rate", {"ratings": {"truth": 5, "style": 2}, "candidate": 0}),
        ),
        ("rating", None, {}, {"axis_0": "3"}, "rate", {"ratings": {"quality": 3}, "candidate": 0}),
        ("thumbs", None, {}, {"choice": "down"}, "thumb", {"up": False, "candidate": 0}),
        ("edit", None, {}, {"text": "better"}, "edit", {"candidate": 0, "text": "better"}),
        ("edit", None, {}, {"unchanged": "on"}, "thumb", {"up": True, "candidate": 0}),
        ("demonstration", None, {}, {"text": "a\nb"}, "write", {"text": "a\nb"}),
    ],
)  # fmt: skip
def test_a_form_becomes_a_record_and_a_form_again(
    open_item, task, order, fields, form, kind, payload
):
    assignment = open_item(task, order, **fields)
    assert payload_of(assignment, form) == (kind, payload)
    assert form_of(assignment, kind, payload) == form
    response = submission.submit(assignment.pk, assignment.user, Judgement(kind, payload))
    kept = record(response)  # raises if the payload is not one of a preference record
    assert (kept.kind, kept.payload) == (kind, json.loads(json.dumps(payload)))


@pytest.mark.parametrize(
    ("task", "form", "message"),
    [
        ("pair", {}, "choose how much better"),
        ("pair", {"choice": "6"}, "choose how much better"),
        ("pair", {"choice": "0"}, "choose how much better"),
        ("ranking", {"place_0": "1", "place_2": "2"}, "give answer 2 a place"),
        ("ranking", {"place_0": "1", "place_1": "9", "place_2": "2"}, "answer 2 must be 1 to 3"),
        ("rating", {}, "rate quality from 1 to 5"),
        ("rating", {"axis_0": "6"}, "rate quality from 1 to 5"),
        ("thumbs", {"choice": "sideways"}, "choose good or bad"),
        ("edit", {"text": " first\r\n"}, "the text is unchanged"),
        ("edit", {"text": "  "}, "write an answer first"),
        ("demonstration", {"text": "\n"}, "write an answer first"),
    ],
)
def test_an_incomplete_form_is_refused_in_words(open_item, task, form, message):
    with pytest.raises(DataError, match=message):
        payload_of(open_item(task), form)


def test_line_ends_of_browsers_are_not_kept(open_item):
    _kind, payload = payload_of(open_item("demonstration"), {"text": "one\r\ntwo"})
    assert payload == {"text": "one\ntwo"}
