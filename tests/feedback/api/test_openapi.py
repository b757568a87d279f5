"""The OpenAPI document names what the API really takes."""

import json
import re
from pathlib import Path

import pytest

from openpalm.feedback.api.openapi import BODIES, QUERIES, document
from openpalm.feedback.api.urls import urlpatterns
from openpalm.feedback.models import ApiToken, Snapshot

PATHS = document(urlpatterns)["paths"]


def test_every_url_is_listed_with_its_methods(db, client):
    served = client.get("/api/v1/openapi.json").json()
    assert served["paths"] == PATHS
    listed = client.get("/api/v1/").json()["urls"]
    assert listed["/api/v1/items"] == ["GET", "POST"]
    for room in ("projects", "items", "responses", "runs", "models", "prompts", "comparisons"):
        assert f"/{room}" in PATHS
    assert {f"/{path}" for path, _ in BODIES} | {f"/{path}" for path in QUERIES} <= set(PATHS)


def test_every_scope_is_used_and_every_post_has_a_body():
    text = str(PATHS)
    assert [scope for scope in ApiToken.SCOPES if f"`{scope}`" not in text] == []
    posts = {path for path, methods in PATHS.items() if "post" in methods}
    assert {f"/{path}" for path, _ in BODIES} == posts


def test_operation_ids_are_unique():
    ids = [one["operationId"] for methods in PATHS.values() for one in methods.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", sorted(QUERIES))
def test_parameters_are_those_that_are_read(project, admin, caller, path):
    """The API itself refuses an unknown parameter, and names all that it knows."""
    snapshot = Snapshot.objects.create(project=project, digest="x", path="/none")
    given = {"project": "demo"} if "project" in QUERIES[path] else {}
    answer = caller(admin).get(
        path.format(slug="demo", snapshot_id=snapshot.pk), **given, colour="red"
    )
    refused = answer.data["error"]["message"]
    known = set(refused.rpartition("known: ")[2].split(", "))
    assert known == set(QUERIES[path])


def test_the_requests_in_the_docs_fit_the_document():
    docs = Path(__file__).parents[3] / "docs" / "feedback-api.md"
    text = docs.read_text(encoding="utf-8")
    calls = re.findall(r"\$api/([\w/-]+)(?:\S*)(?: -d '(\{.*?\})')?[ \n]", text, re.DOTALL)
    assert len(calls) > 12
    for path, body in calls:
        (known,) = [p for p in PATHS if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", p), f"/{path}")]
        if body:
            properties, required = BODIES[known[1:], "POST"]
            assert set(required) <= set(json.loads(body)) <= set(properties), path
