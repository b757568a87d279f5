"""Exports of Argilla 1 and 2, after their documented shapes, and the records that they hold."""

import json
import re

import datasets
import pytest

from openpalm.data.rows.imports.read_export import find_tool, read_export
from openpalm.data.rows.imports.tasks import Roles
from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError

CREATED = "2026-02-01T00:00:00+00:00"
FIELDS = {"instruction": "Sky?", "response-1": "red", "response-2": "blue", "response-3": "green"}
# Argilla 2, `dataset.records.to_json`: ann ranked and rated, bob labelled and commented.
RANKED = {
    "id": "r1",
    "fields": FIELDS,
    "metadata": {"topic": "weather"},
    "suggestions": {"ranking": {"value": ["response-1"], "score": None, "agent": "judge"}},
    "responses": {
        "ranking": [{"value": ["response-2", "response-1", "response-3"], "user_id": "ann"}],
        "quality-2": [{"value": 5, "user_id": "ann"}, {"value": 4, "user_id": "bob"}],
        "comment": [{"value": "good", "user_id": "bob"}],
        "tags": [{"value": ["rude", "long"], "user_id": "bob"}],
    },
    "vectors": {},
    "_server_id": "5d3e",
}
RATED = {
    "id": "r2",
    "fields": {"prompt": "Sky?", "response": "red"},
    "responses": {
        "honesty": [{"value": 2, "user_id": "ann"}],
        "style": [{"value": 5, "user_id": "ann"}],
        "corrected_response": [{"value": "Blue.", "user_id": "ann"}],
        "verdict": [{"value": "thumbs-down", "user_id": "bob"}],
    },
}
# Argilla 1, records of a FeedbackDataset.
FIRST = {
    "fields": {"prompt": "Sky?", "answer_a": "red", "answer_b": "blue"},
    "external_id": "e7",
    "metadata": {},
    "suggestions": [],
    "responses": [
        {
            "user_id": "u1",
            "status": "submitted",
            "inserted_at": "2023-10-01T10:00:00",
            "values": {"better": {"value": "B"}, "kindness_a": {"value": 4}},
        },
        {"user_id": "u2", "status": "submitted", "values": {"better": {"value": "Tie"}}},
        {"user_id": "u3", "status": "submitted", "values": {"better": {"value": "both bad"}}},
        {"user_id": "u4", "status": "draft", "values": {"better": {"value": "A"}}},
        {"user_id": "u5", "status": "discarded", "values": None},
    ],
}
# Argilla 1, a data set on the hub.
HUB = {
    "prompt": "Sky?",
    "response-1": "red",
    "response-2": "blue",
    "order": [
        {
            "user_id": "u1",
            "value": [{"rank": 1, "value": "response-2"}, {"rank": 1, "value": "response-1"}],
            "status": "submitted",
        },
        {
            "user_id": None,
            "value": [{"rank": 2, "value": "response-1"}, {"rank": 1, "value": "response-2"}],
            "status": "submitted",
        },
    ],
    "order-suggestion": None,
    "order-suggestion-metadata": {"type": None, "score": None, "agent": None},
    "external_id": "h1",
    "metadata": "{}",
}
# Argilla 2, `to_datasets`.
FLAT = {
    "id": "f1",
    "status": "completed",
    "inserted_at": "2024-12-13T15:48:34.923000",
    "updated_at": "2024-12-13T16:00:00",
    "_server_id": "8986",
    "prompt": "Sky?",
    "completion": "red",
    "rating.responses": [4, 2],
    "rating.responses.users": ["ann", "bob"],
    "rating.responses.status": ["submitted", "draft"],
    "rating.suggestion": 3,
    "rating.suggestion.score": 0.5,
    "rating.suggestion.agent": "judge",
    "metadata.topic": "weather",
}


def read(tmp_path, *rows, name="export.json", **given):
    path = tmp_path / name
    lines = name.endswith(".jsonl")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    counts = StreamCounts()
    return list(read_export(path, counts=counts, created=CREATED, **given)), counts


def judgements(tasks):
    return [(p.author, p.kind, p.payload) for task in tasks for p in task.preferences]


def texts(task):
    return [c.text for c in task.candidates]


def test_argilla_2(tmp_path):
    tasks, counts = read(tmp_path, RANKED, RATED)
    assert [[(m.role, m.content) for m in task.prompt] for task in tasks] == [
        [("user", "Sky?")]
    ] * 2
    assert list(map(texts, tasks)) == [["red", "blue", "green"], ["red"]]
    assert judgements(tasks[:1]) == [
        ("ann", "rank", {"order": [[1], [0], [2]]}),
        ("ann", "rate", {"ratings": {"quality": 5}, "candidate": 1}),
        ("bob", "rate", {"ratings": {"quality": 4}, "candidate": 1}),
    ]
    assert judgements(tasks[1:]) == [
        ("ann", "edit", {"candidate": 0, "text": "Blue."}),
        ("ann", "rate", {"ratings": {"honesty": 2, "style": 5}, "candidate": 0}),
        ("bob", "thumb", {"up": False, "candidate": 0}),
    ]
    assert counts.used == 6
    assert counts.unused == {
        "a suggestion of a model": 1,
        "text of question 'comment', which no record holds": 1,
        "a ranking of names that are no completions": 1,
    }
    (first, *_) = tasks[0].preferences
    assert re.fullmatch("argilla:r1:[0-9a-f]{12}:ann:0", first.id)
    assert (first.author_kind, first.created) == ("person", CREATED)


def test_argilla_1(tmp_path):
    tasks, counts = read(tmp_path, FIRST)
    assert judgements(tasks) == [
        ("u1", "compare", {"better": 1, "worse": 0, "strength": 1}),
        ("u1", "rate", {"ratings": {"kindness": 4}, "candidate": 0}),
        ("u2", "compare", {"tie": [0, 1]}),
        ("u3", "compare", {"both_bad": [0, 1]}),
    ]
    assert counts.unused == {"draft response": 1, "discarded response": 1}


def test_argilla_1_on_the_hub(tmp_path):
    tasks, counts = read(tmp_path, HUB, name="export.jsonl")
    assert judgements(tasks) == [
        ("u1", "rank", {"order": [[1, 0]]}),
        ("unknown user", "rank", {"order": [[1], [0]]}),
    ]
    assert not counts.unused


def test_argilla_2_as_a_dataset(tmp_path):
    tasks, counts = read(tmp_path, FLAT, name="export.jsonl")
    assert judgements(tasks) == [("ann", "rate", {"ratings": {"rating": 4}, "candidate": 0})]
    assert tasks[0].preferences[0].created == "2024-12-13T16:00:00+00:00"
    assert counts.unused == {"a suggestion of a model": 1, "draft response": 1}


@pytest.mark.parametrize("row", [HUB, FLAT])
def test_what_datasets_writes_is_read_alike(tmp_path, row):
    """`datasets` adds null columns, and milliseconds in place of a time."""
    path = tmp_path / "written.jsonl"
    datasets.Dataset.from_list([row]).to_json(path)
    again = list(read_export(path, created=CREATED))
    tasks, _ = read(tmp_path, row)
    assert judgements(again) == judgements(tasks)


def test_an_object_of_lists_is_read_as_a_list_of_objects(tmp_path):
    columns = {key: [answer[key] for answer in HUB["order"]] for key in HUB["order"][0]}
    columns["value"] = [{k: [v[k] for v in value] for k in value[0]} for value in columns["value"]]
    tasks, _ = read(tmp_path, HUB)
    assert judgements(read(tmp_path, HUB | {"order": columns})[0]) == judgements(tasks)


def test_milliseconds_and_seconds_are_times(tmp_path):
    for time in (1734105600000, 1734105600):
        tasks, _ = read(tmp_path, FLAT | {"updated_at": time}, name="export.jsonl")
        assert tasks[0].preferences[0].created == "2024-12-13T16:00:00+00:00"


def test_a_chat_field_is_a_prompt_and_its_last_turn_a_completion(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Sky?"), ("assistant", "Blue.")]
    chat = [{"role": role, "content": text} for role, text in turns]
    row = {"id": "c", "fields": {"chat": chat}, "responses": {"ok": [{"value": "Good!"}]}}
    tasks, counts = read(tmp_path, row)
    assert [m.content for m in tasks[0].prompt] == ["Hi", "Hello.", "Sky?"]
    assert texts(tasks[0]) == ["Blue."]
    assert judgements(tasks) == [("unknown user", "thumb", {"up": True, "candidate": 0})]
    assert not counts.unused


def test_a_task_without_a_judgement_keeps_prompt_and_completions(tmp_path):
    tasks, counts = read(tmp_path, RANKED | {"responses": {}, "suggestions": {}})
    assert texts(tasks[0]) == ["red", "blue", "green"]
    assert tasks[0].preferences == []
    assert counts.unused == {"no judgement": 1}


def test_a_demonstration(tmp_path):
    row = {"fields": {"text": "Sky?"}, "responses": {"answer": [{"value": "Blue.", "user_id": 3}]}}
    tasks, _ = read(tmp_path, row)
    assert judgements(tasks) == [("3", "write", {"text": "Blue."})]
    assert tasks[0].preferences[0].id.startswith("argilla:")


def test_roles_say_what_names_do_not(tmp_path):
    fields = {"frage": "Sky?", "x": "red", "y": "blue", "topic": "weather"}
    answers = {"Kommentar": [{"value": "y", "user_id": "a"}], "besser": [{"value": "y"}]}
    row = {"id": 1, "fields": fields, "responses": answers}
    with pytest.raises(DataError, match=r"record 1: no field has the name of a prompt \('frage', "):
        read(tmp_path, row)
    roles = Roles("frage", ("x", "y"), {"Kommentar": "ignore"})
    tasks, counts = read(tmp_path, row, roles=roles)
    assert judgements(tasks) == [
        ("unknown user", "compare", {"better": 1, "worse": 0, "strength": 1})
    ]
    assert counts.unused == {
        "field 'topic', which no record holds": 1,
        "question 'Kommentar', which is to be ignored": 1,
    }
    with pytest.raises(DataError, match="question 'q' cannot give 'vote'; say one of compare"):
        Roles(questions={"q": "vote"})


def test_a_blank_field_beside_the_prompt_is_no_empty_prompt(tmp_path):
    fields = {"prompt": "Sky?", "question": "", "response": "red"}
    assert len(read(tmp_path, {"fields": fields, "responses": {}})[0]) == 1
    tasks, counts = read(tmp_path, {"fields": fields | {"prompt": " "}, "responses": {}})
    assert (tasks, counts.unused["empty prompt"]) == ([], 1)


def test_yes_praises_only_if_the_question_is_called_a_thumb(tmp_path):
    row = RATED | {"responses": {"rude": [{"value": "yes", "user_id": "a"}]}}
    tasks, counts = read(tmp_path, row)
    assert (judgements(tasks), counts.used) == ([], 0)
    for value, up in (("Yes", True), ("no", False)):
        row = RATED | {"responses": {"fine": [{"value": value, "user_id": "a"}]}}
        tasks, _ = read(tmp_path, row, roles=Roles(questions={"fine": "thumb"}))
        assert judgements(tasks) == [("a", "thumb", {"up": up, "candidate": 0})]


def test_a_grade_is_no_comparison(tmp_path):
    fields = {"prompt": "Sky?", "answer_a": "red", "answer_b": "blue"}
    row = {"fields": fields, "responses": {"grade": [{"value": "B", "user_id": "a"}]}}
    assert judgements(read(tmp_path, row)[0]) == []
    roles = Roles(questions={"grade": "compare"})
    better = {"better": 1, "worse": 0, "strength": 1}
    assert judgements(read(tmp_path, row, roles=roles)[0]) == [("a", "compare", better)]
    row = {"fields": fields, "responses": {"grade": [{"value": "answer b", "user_id": "a"}]}}
    assert judgements(read(tmp_path, row)[0]) == [("a", "compare", better)]


def test_correctness_is_no_correction(tmp_path):
    row = RATED | {"responses": {"correctness": [{"value": "Correct", "user_id": "a"}]}}
    assert judgements(read(tmp_path, row)[0]) == [("a", "thumb", {"up": True, "candidate": 0})]
    row = RATED | {"responses": {"correctness": [{"value": "mostly", "user_id": "a"}]}}
    assert judgements(read(tmp_path, row)[0]) == []


def test_a_second_reading_gives_the_same_ids(tmp_path):
    rows = [RANKED, RATED, {"fields": RATED["fields"], "responses": RATED["responses"]}]
    twice = [
        [p.id for task in read(tmp_path, *rows)[0] for p in task.preferences] for _ in range(2)
    ]
    assert twice[0] == twice[1]
    assert len({*twice[0]}) == len(twice[0]) == 9


def test_equal_ids_of_two_projects_stay_apart(tmp_path):
    other = RATED | {"fields": RATED["fields"] | {"prompt": "Sea?"}}
    ids = [p.id for task in read(tmp_path, RATED, other)[0] for p in task.preferences]
    assert len({*ids}) == len(ids) == 6


def changed(row, **fields):
    return row | fields


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (changed(RATED, responses=7), '"responses" is 7'),
        (changed(RATED, responses=[7]), r'"responses\[0\]" is 7'),
        (changed(RATED, responses=[{"values": 3}]), r'"responses\[0\].values" is 3'),
        (changed(RATED, responses={"q": {"a": 1}}), r'"responses.q" must have lists of equal'),
        (changed(RATED, responses={"q": [{"value": 1, "user_id": [1]}]}), r"q\[0\].user_id"),
        (changed(RATED, responses={"q": [{"value": 1, "status": 3}]}), r"q\[0\].status"),
        (changed(RATED, suggestions=3), '"suggestions" is 3'),
        (changed(RATED, fields={"prompt": 3, "response": "a"}), '"prompt" is 3'),
        (changed(RATED, fields={"prompt": "Sky?", "response": {}, "x": {}}), None),
        (changed(RATED, fields={"prompt": "Sky?", "response": {"a": 1}}), '"response" is a dict'),
        (changed(RATED, id={"a": 1}), 'field "id" is'),
        (changed(FLAT, updated_at="soon"), "\"updated_at\" is 'soon'; it must be a time"),
        (changed(FLAT, updated_at=1e200), '"updated_at" is 1e'),
        (changed(FLAT, **{"rating.responses.users": ["a"]}), "must be a list as long as"),
        (changed(FLAT, **{"rating.responses": 3}), '"rating.responses" is 3'),
        ({"id": 1, "text": "x"}, "are not those of an export of Argilla or Label Studio"),
        (
            changed(RATED, fields={"prompt": "a", "responses": ["x"] * 65}),
            "has 65 completions; the most are 64",
        ),
    ],
)
def test_wrong_types_give_one_line(tmp_path, row, says):
    if says is None:
        assert texts(read(tmp_path, row)[0][0]) == []
        return
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path, row)
    assert str(caught.value).startswith(f"{tmp_path / 'export.json'}, record 1: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0, "a rating of 0; records have whole numbers from 1 to 5"),
        (2.5, "a rating of 2.5; records have whole numbers from 1 to 5"),
        (10**400, "answer to 'q', which no record holds"),
        (True, "answer to 'q', which no record holds"),
        ([{"start": 0, "end": 2, "label": "x"}], "answer to 'q', which no record holds"),
        ("maybe", "text of question 'q', which no record holds"),
        (["maybe"], "label 'maybe' of question 'q', which no record holds"),
        (["response"], "label 'response' of question 'q', which no record holds"),
        ([[["x"]] * 3], "answer to 'q', which no record holds"),
    ],
)
def test_answers_without_a_record_are_counted(tmp_path, value, reason):
    row = changed(RATED, responses={"q": [{"value": value, "user_id": "a"}]})
    tasks, counts = read(tmp_path, row)
    assert tasks[0].preferences == []
    assert counts.unused == {reason: 1}


def test_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"exports are read from .json, .jsonl"):
        list(read_export(tmp_path / "export.csv"))
    with pytest.raises(DataError, match=r"record 2: its fields \('a'\) are not those of a row of"):
        read(tmp_path, RATED, {"a": 1})


def test_detection():
    found = [find_tool(row) for row in (RANKED, RATED, FIRST, HUB, FLAT)]
    assert {tool and tool.name for tool in found} == {"Argilla"}
    assert find_tool({"prompt": "a", "chosen": "b", "rejected": "c"}) is None
    assert find_tool({}) is None
