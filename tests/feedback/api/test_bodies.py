"""Bodies and queries are read strictly, and every error has one shape."""

import json

import pytest

from openpalm.feedback.models import Item, Project

PAIR = {"prompt": "2 + 2?", "candidates": [{"text": "4"}, {"text": "5"}]}


def items(**changes):
    return {"project": "demo", "items": [PAIR | changes]}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"items": [PAIR]}, "project"),
        ({"project": "demo"}, "items"),
        ({"project": "demo", "items": []}, "items"),
        ({"project": "demo", "items": [PAIR] * 501}, "items"),
        ({"project": "demo", "items": {}}, "items"),
        ({"project": "demo", "items": [3]}, "items"),
        ({"project": 7, "items": [PAIR]}, "project"),
        (items() | {"priorty": 1}, "priorty"),
        (items(colour="red"), "items[0].colour"),
        (items(prompt=""), "items[0].prompt"),
        (items(prompt="x" * 100_001), "items[0].prompt"),
        (items(prompt=" "), "items[0].prompt"),
        (items(prompt="a\0b"), "items[0].prompt"),
        (items(prompt="a\ud800b"), "items[0].prompt"),
        (items(candidates=[{"text": "4"}]), "items[0].candidates"),
        (items(candidates=[{"text": "4"}, {"text": 5}]), "items[0].candidates[1].text"),
        (items(candidates=[{"text": "4"}, {"txt": "5"}]), "items[0].candidates[1].text"),
        (
            items(candidates=[{"text": "4"}, {"text": "5", "model": "?"}]),
            "items[0].candidates[1].model",
        ),
        (items(priority=True), "items[0].priority"),
        (items(priority="1"), "items[0].priority"),
        (items(needed=0), "items[0].needed"),
        (items(needed=1.0), "items[0].needed"),
        (items(needed=10**30), "items[0].needed"),
        (items(gold={"better": 0, "worse": 0, "strength": 1}), "items[0].gold"),
        (items(gold={"better": 0, "worse": 1, "strength": 3}), "items[0].gold"),
        (items(key="x" * 101), "items[0].key"),
    ],
)
def test_a_wrong_field_is_named(project, admin, caller, body, field):
    response = caller(admin).post("items", body)
    assert response.status_code == 400, response.data
    assert response.data["error"]["field"] == field
    assert set(response.data["error"]) == {"code", "message", "field"}
    assert not Item.objects.exists()


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "7",
        '{"project": NaN}',
        '{"project": "a", "project": "b"}',
        "[" * 100_000,
        '{"a": ' * 50 + "1" + "}" * 50,
        '{"priority": 1e999}',
        b"\xff\xfe",
        '{"n": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_not_json_is_refused(project, admin, caller, content):
    assert caller(admin).post("items", content=content).status_code == 400


def test_a_large_body_or_another_type_is_refused(project, admin, caller):
    api = caller(admin)
    assert api.post("items", content=" " * (2 * 2**20 + 1)).status_code == 413
    form = "application/x-www-form-urlencoded"
    assert api.post("items", content="project=demo", content_type=form).status_code == 415


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 501},
        {"limit": "ten"},
        {"after": -1},
        {"after": 10**30},
        {"state": "lost"},
        {"offset": 5},
        {"limit": [1, 2]},
        {"project": "a\0"},
    ],
)
def test_a_wrong_parameter_is_named(project, admin, caller, query):
    response = caller(admin).get("items", **({"project": "demo"} | query))
    assert (response.status_code, response.data["error"]["field"]) == (400, next(iter(query)))


def test_errors_of_urls_and_methods_have_the_shape_too(project, admin, caller):
    api = caller(admin)
    wrong = [
        api.get("nothing"),
        api.delete("items"),
        api.get(f"items/{10**30}"),
        api.get("items/7"),
    ]
    assert [one.status_code for one in wrong] == [404, 405, 404, 404]
    assert wrong[1]["Allow"] == "GET, POST"
    assert all(set(one.data["error"]) == {"code", "message", "field"} for one in wrong)


def test_a_failure_of_ours_shows_no_details(project, admin, caller, monkeypatch, caplog):
    monkeypatch.setattr(Project, "guideline", property(lambda self: 1 / 0))
    response = caller(admin).get("projects/demo")
    assert response.status_code == 500
    assert "ZeroDivisionError" not in json.dumps(response.data)
    assert "ZeroDivisionError" in caplog.text
