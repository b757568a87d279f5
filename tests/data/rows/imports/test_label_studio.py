"""Exports of Label Studio, written after its documented shapes, and the records that they hold."""

import json
import re
import tracemalloc

import pytest

from openpalm.data.rows.imports.read_export import find_tool, read_export
from openpalm.data.rows.imports.tasks import Roles
from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError

CREATED = "2026-02-01T00:00:00+00:00"


def result(kind, value, question="q", about="answer1,answer2"):
    return {"id": "x", "from_name": question, "to_name": about, "type": kind, "value": value}


def annotation(number, *results, **fields):
    given = {
        "id": number,
        "completed_by": 7,
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2026-01-05T09:00:00.5Z",
        "lead_time": 12.5,
    }
    return given | {"result": list(results)} | fields


def task(*annotations, data=None, **fields):
    data = data or {"prompt": "Sky?", "answer1": "red", "answer2": "blue"}
    return {"id": 3, "data": data, "annotations": list(annotations), "predictions": []} | fields


ITEMS = [
    {"id": "llm_1", "title": "Model 1", "body": "red"},
    {"id": "llm_2", "title": "Model 2", "body": "blue"},
    {"id": 3, "html": "green"},
]
ONE = {"prompt": "Sky?", "response": "red"}
LEFT = result("pairwise", {"selected": "left"})


def read(tmp_path, *rows, **given):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    counts = StreamCounts()
    return list(read_export(path, counts=counts, created=CREATED, **given)), counts


def judgements(tasks):
    return [(p.author, p.kind, p.payload) for task in tasks for p in task.preferences]


def test_a_pairwise_project(tmp_path):
    email = {"id": 9, "email": "bob@example.org", "first_name": "Bob"}
    tasks, counts = read(
        tmp_path,
        task(
            annotation(1, LEFT),
            annotation(2, result("pairwise", {"selected": "right"}), completed_by=email),
            annotation(3, result("pairwise", {"selected": "none"})),
            annotation(4, LEFT, was_cancelled=True),
            annotation(5),
            predictions=[{"model_version": "m", "result": []}],
            drafts=[{"result": []}],
        ),
    )
    assert [c.text for c in tasks[0].candidates] == ["red", "blue"]
    assert judgements(tasks) == [
        ("7", "compare", {"better": 0, "worse": 1, "strength": 1}),
        ("bob@example.org", "compare", {"better": 1, "worse": 0, "strength": 1}),
    ]
    first = tasks[0].preferences[0]
    assert re.fullmatch("label-studio:3:[0-9a-f]{12}:1:0", first.id)
    assert (first.created, first.elapsed_s) == ("2026-01-05T09:00:00.500000+00:00", 12.5)
    assert counts.unused == {
        "a prediction of a model": 1,
        "a draft": 1,
        "no side is selected": 1,
        "a skipped annotation": 1,
        "an annotation without an answer": 1,
    }


def test_tags_that_have_other_names_than_the_data(tmp_path):
    """`<Pairwise toName="left_text,right_text">` over `$answer1` and `$answer2`."""
    other = result("pairwise", {"selected": "right"}, about="left_text,right_text")
    swapped = result("pairwise", {"selected": "left"}, about="answer2,answer1")
    tasks, _ = read(tmp_path, task(annotation(1, other), annotation(2, swapped)))
    assert [payload["better"] for _, _, payload in judgements(tasks)] == [1, 1]


def test_a_ranking_of_a_list(tmp_path):
    data = {"prompt": "Sky?", "items": ITEMS}
    full = result("ranker", {"ranker": ["llm_2", 3, "llm_1"]}, about="answers")
    part = result("ranker", {"ranker": ["llm_2"]}, about="answers")
    buckets = result("ranker", {"ranker": {"best": ["llm_2"], "other": ["llm_1", 3]}})
    strange = result("ranker", {"ranker": ["llm_2", {}, [[]]]})
    tasks, counts = read(tmp_path, task(annotation(1, full, part, buckets, strange), data=data))
    assert [c.text for c in tasks[0].candidates] == ["red", "blue", "green"]
    assert judgements(tasks) == [("7", "rank", {"order": [[1], [2], [0]]})]
    assert counts.unused == {
        "a ranking that does not have each of two or more completions once": 1,
        "a ranking in buckets, which have no order": 1,
        "a ranking of names that are no completions": 1,
    }


def test_ratings_choices_and_texts(tmp_path):
    tasks, counts = read(
        tmp_path,
        task(
            annotation(
                1,
                result("rating", {"rating": 4}, "helpful", "text"),
                result("number", {"number": 2}, "honest", "text"),
                result("choices", {"choices": ["Good"]}, "verdict", "text"),
                result("choices", {"choices": ["a", "b"]}, "tags", "text"),
                result("textarea", {"text": ["Blue.", "Truly."]}, "correction", "text"),
                result("textarea", {"text": ["too red"]}, "reason", "text"),
                result("labels", {"start": 0, "end": 2, "labels": ["x"]}, "spans", "text"),
            ),
            annotation(2, result("rating", {"rating": 9}, "helpful", "text")),
            data=ONE,
        ),
    )
    assert judgements(tasks) == [
        ("7", "thumb", {"up": True, "candidate": 0}),
        ("7", "edit", {"candidate": 0, "text": "Blue.\nTruly."}),
        ("7", "rate", {"ratings": {"helpful": 4, "honest": 2}, "candidate": 0}),
    ]
    assert [p.elapsed_s for p in tasks[0].preferences] == [12.5, None, None]
    assert counts.unused == {
        "answer to 'tags', which no record holds": 1,
        "text of question 'reason', which no record holds": 1,
        "a result of type 'labels', which no record holds": 1,
        "a rating of 9; records have whole numbers from 1 to 5": 1,
    }


def test_each_of_two_completions_is_rated(tmp_path):
    results = [
        result("rating", {"rating": 5}, "stars", "answer2"),
        result("rating", {"rating": 1}, "stars_1", "t1"),
        result("rating", {"rating": 3}, "overall", "t1"),
        result("choices", {"choices": ["Tie"]}, "better", "prompt"),
    ]
    tasks, counts = read(tmp_path, task(annotation(1, *results)))
    assert judgements(tasks) == [
        ("7", "compare", {"tie": [0, 1]}),
        ("7", "rate", {"ratings": {"stars": 5}, "candidate": 1}),
        ("7", "rate", {"ratings": {"stars": 1}, "candidate": 0}),
    ]
    assert counts.unused == {"question 'overall' does not say which completion it rates": 1}


def test_json_min(tmp_path):
    base = {
        "id": 12,
        "prompt": "Sky?",
        "answer1": "red",
        "answer2": "blue",
        "annotator": 4,
        "annotation_id": 50,
        "created_at": "2026-01-05T09:00:00Z",
        "updated_at": "2026-01-05T09:00:00Z",
        "lead_time": 3,
    }
    rows = [
        base | {"pairwise": [{"selected": "left"}]},
        base | {"annotation_id": 51, "verdict": "tie", "stars_2": [{"rating": 2}]},
        base | {"annotation_id": 52, "topic": "weather", "kind": {"choices": ["B", "C"]}},
    ]
    tasks, counts = read(tmp_path, *rows)
    assert judgements(tasks) == [
        ("4", "compare", {"better": 0, "worse": 1, "strength": 1}),
        ("4", "compare", {"tie": [0, 1]}),
        ("4", "rate", {"ratings": {"stars": 2}, "candidate": 1}),
    ]
    assert re.fullmatch("label-studio:12:[0-9a-f]{12}:50:0", tasks[0].preferences[0].id)
    assert counts.unused == {
        "field 'topic', which no record holds": 1,
        "answer to 'kind', which no record holds": 1,
    }


def test_a_completion_may_be_the_word_of_a_label(tmp_path):
    row = {"prompt": "tie", "answer1": "good", "answer2": "Left", "annotation_id": 1}
    tasks, _ = read(tmp_path, row | {"pw": [{"selected": "left"}]})
    assert [c.text for c in tasks[0].candidates] == ["good", "Left"]
    assert [kind for _, kind, _ in judgements(tasks)] == ["compare"]


def test_an_axis_counts_once(tmp_path):
    twice = [result("rating", {"rating": n}, "stars", "response") for n in (2, 5)]
    tasks, counts = read(tmp_path, task(annotation(1, *twice), data=ONE))
    assert judgements(tasks) == [("7", "rate", {"ratings": {"stars": 2}, "candidate": 0})]
    assert counts.unused == {"a second rating of 'stars' of one completion": 1}


def test_json_min_texts_need_roles(tmp_path):
    row = {"prompt": "Sky?", "output": "red", "better_answer": "Blue.", "annotation_id": 1}
    tasks, counts = read(tmp_path, row)
    assert judgements(tasks) == []
    assert counts.unused == {
        "field 'better_answer', which no record holds": 1,
        "an annotation without an answer": 1,
    }
    tasks, counts = read(tmp_path, row, roles=Roles(questions={"better_answer": "edit"}))
    assert judgements(tasks) == [("unknown user", "edit", {"candidate": 0, "text": "Blue."})]
    assert not counts.unused


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (task() | {"annotations": 3}, '"annotations" is 3'),
        (task(3), r'"annotations\[0\]" is 3'),
        (task(annotation(1) | {"result": None}), r'"annotations\[0\].result" is missing'),
        (task(annotation(1, 3)), r'"annotations\[0\].result\[0\]" is 3'),
        (task(annotation(1, LEFT, lead_time=-1)), r'"annotations\[0\].lead_time" is -1'),
        (task(annotation(1, LEFT, lead_time=float("nan"))), r"lead_time\" is nan"),
        (task(annotation(1, LEFT, created_at="x")), r'"annotations\[0\].created_at" is \'x\''),
        (task(annotation(1, LEFT, completed_by=[1])), r"completed_by"),
        (task(annotation({}, LEFT)), r'"annotations\[0\].id"'),
        (task(annotation(1, result("rating", {"rating": "5"}))), r"value.rating\" is '5'"),
        (task(annotation(1, result("choices", {"choices": 5}))), r'value.choices" is 5'),
        (task(annotation(1, result("textarea", {"text": [5]}))), r'value.text" is a list'),
        (task(predictions=3), '"predictions" is 3'),
        (task(data={"prompt": "a", "items": [{"id": 1}]}), r'"items\[0\].text" is missing'),
        (task(data={"prompt": "a", "items": [3]}), r'"items\[0\]" is 3'),
        (task(data={"image": "x.png", "other": "y"}), "no field has the name of a prompt"),
    ],
)
def test_wrong_types_give_one_line(tmp_path, row, says):
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path, row)
    assert str(caught.value).startswith(f"{tmp_path / 'export.json'}, record 1: ")
    assert "\n" not in str(caught.value)


def test_hostile_values_are_counted(tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    values = [
        result("pairwise", {"selected": deep}),
        result("pairwise", {"selected": 10**300}),
        result("ranker", {"ranker": [deep, None, True, 1e308]}),
        result("choices", {"choices": [deep]}),
        result("choices", {"choices": deep}),
        result(deep, {"other": deep}),
    ]
    tasks, counts = read(tmp_path, task(annotation(1, *values), extra=deep))
    assert tasks[0].preferences == []
    assert sum(counts.unused.values()) == len(values)


def test_many_reasons_stay_bounded(tmp_path):
    results = [result("choices", {"choices": [f"label {i}"]}) for i in range(1000)]
    _, counts = read(tmp_path, task(annotation(1, *results)))
    assert len(counts.unused) <= 201
    assert counts.unused["other reasons"] == 800


def test_an_unusable_prompt_is_counted(tmp_path):
    tasks, counts = read(tmp_path, task(annotation(1, LEFT), data={"prompt": " ", "text": " "}))
    assert (tasks, counts.unused) == ([], {"empty prompt": 1})


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "export.json"
    rows = (
        task(annotation(1, LEFT), data={"prompt": f"{i}" * 500, "answer1": "a", "answer2": "b"})
        for i in range(6000)
    )
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for i, row in enumerate(rows):
            file.write("," * bool(i) + json.dumps(row))
        file.write("]")
    size = path.stat().st_size
    tracemalloc.start()
    count = sum(len(task.preferences) for task in read_export(path, created=CREATED))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6000
    assert size > 10_000_000
    assert most < size / 2


def test_detection():
    found = [find_tool(task()), find_tool({"annotation_id": 1})]
    assert [tool and tool.name for tool in found] == ["Label Studio", "Label Studio JSON-MIN"]
