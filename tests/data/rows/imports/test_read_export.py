"""Exports with any value changed: records, or one line of DataError, never another exception."""

import importlib.util
import json
import random
from copy import deepcopy
from pathlib import Path

import pytest

from openpalm.data.rows.imports.read_export import read_export
from openpalm.data.rows.imports.tasks import Roles
from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError


def samples(name):
    path = Path(__file__).with_name(f"test_{name}.py")
    spec = importlib.util.spec_from_file_location(f"samples_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


argilla, label_studio = samples("argilla"), samples("label_studio")
RANKER = label_studio.result("ranker", {"ranker": ["llm_2", 3, "llm_1"]}, about="answers")
CHOICES = label_studio.result("choices", {"choices": ["left"]})
ROWS = {
    "argilla 1": argilla.FIRST,
    "argilla 1 on the hub": argilla.HUB,
    "argilla 2": argilla.RANKED,
    "argilla 2 texts": argilla.RATED,
    "argilla 2 flat": argilla.FLAT,
    "pairs": label_studio.task(label_studio.annotation(1, label_studio.LEFT, CHOICES)),
    "ranker": label_studio.task(
        label_studio.annotation(1, RANKER), data={"prompt": "Sky?", "items": label_studio.ITEMS}
    ),
    "min": {
        "prompt": "Sky?",
        "answer1": "a",
        "answer2": "b",
        "annotation_id": 1,
        "pairwise": [{"selected": "left"}],
        "stars_1": [{"rating": 3}],
        "created_at": "2026-01-05T09:00:00Z",
    },
}
HOSTILE = [
    *(None, True, 0, -1, 1e308, 10**40, float("nan"), float("inf"), "", " ", "x", "=1", "tie", "1"),
    *([], {}, [[]], [None], [{}], {"a": []}, ["a", 1], [{"role": "user", "content": 1}]),
    *([{"role": "tool", "content": "x"}], {"value": {}}, [{"value": [], "user_id": "a"}]),
    json.loads("[" * 800 + "]" * 800),
]


def places(value):
    """(container, key) of every value inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def read_or_error(path, counts):
    try:
        return list(read_export(path, Roles(), counts)), None
    except DataError as error:
        return [], str(error)


@pytest.mark.parametrize("name", ROWS)
def test_any_value_may_be_wrong(tmp_path, name):
    path = tmp_path / "export.json"
    rng = random.Random(name)
    read = refused = 0
    for _ in range(300):
        row = deepcopy(ROWS[name])
        for container, key in rng.sample(list(places(row)), rng.randrange(1, 3)):
            container[key] = rng.choice(HOSTILE)
        path.write_text(json.dumps([row]), encoding="utf-8")
        counts = StreamCounts()
        tasks, error = read_or_error(path, counts)
        if error is not None:
            refused += 1
            assert error.startswith(f"{path}, record 1: ")
            assert len(error) < 1000
            assert error.isprintable()
            continue
        read += 1
        records = [p for task in tasks for p in task.preferences]
        assert counts.used == len(records)
        assert [Preference.from_json(p.to_json(), "x") for p in records] == records
        assert records or counts.unused
    assert min(read, refused) > 20


def test_a_line_is_named(tmp_path):
    path = tmp_path / "export.jsonl"
    lines = [json.dumps(argilla.RATED), json.dumps(argilla.RATED | {"id": []}), ""]
    lines[1] = json.dumps(argilla.RATED | {"responses": 3})
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r'export.jsonl:2: field "responses" is 3'):
        list(read_export(path))


def test_a_judgement_without_a_time_gets_the_time_of_reading(tmp_path):
    path = tmp_path / "export.jsonl"
    path.write_text(json.dumps(argilla.RATED), encoding="utf-8")
    (task,) = read_export(path)
    assert task.preferences[0].created.endswith("+00:00")


def judged(name):
    counts = StreamCounts()
    tasks = read_export(Path(__file__).parent / "data" / name, counts=counts)
    records = [p for task in tasks for p in task.preferences]
    return [(p.author[:6], p.kind, p.payload) for p in records], counts.unused


def test_files_that_argilla_wrote():
    """Two records, three users' answers, written by argilla 2.8.0 in both of its ways."""
    submitted = [
        ("d566b5", "rank", {"order": [[1], [0]]}),
        ("d566b5", "rate", {"ratings": {"quality": 4}, "candidate": 0}),
        ("6f1a84", "compare", {"better": 0, "worse": 1, "strength": 1}),
    ]
    records, unused = judged("argilla_2.8_flat.jsonl")
    assert sorted(map(str, records)) == sorted(map(str, submitted))
    assert unused == {
        "a suggestion of a model": 1,
        "draft response": 1,
        "field 'topic', which no record holds": 1,
    }
    # to_json writes no status: a draft looks as if it was submitted.
    records, unused = judged("argilla_2.8_to_json.json")
    draft = ("6f1a84", "compare", {"tie": [0, 1]})
    assert sorted(map(str, records)) == sorted(map(str, [*submitted, draft]))
    assert unused == {"a suggestion of a model": 1}


def test_a_file_that_label_studio_wrote():
    """JSON-MIN that label-studio-sdk 2.1 made of the JSON beside it."""
    whole, unused = judged("label_studio.json")
    assert whole == [
        ("a@b.c", "compare", {"better": 1, "worse": 0, "strength": 1}),
        ("a@b.c", "rate", {"ratings": {"stars": 4}, "candidate": 0}),
        ("a@b.c", "compare", {"tie": [0, 1]}),
    ]
    assert unused == {"text of question 'why', which no record holds": 1}
    records, unused = judged("label_studio_sdk_2.1_min.json")
    assert records == whole
    assert unused == {"field 'why', which no record holds": 1}
