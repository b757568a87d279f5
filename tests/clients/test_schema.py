"""Schemathesis: the server answers as /openapi.json documents."""

import base64
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from command_line import rows, write_base
from servers import serving

CONFIG = Path(__file__).with_name("schemathesis.toml")
REQUESTS = int(os.environ.get("OPENPALM_SCHEMA_REQUESTS", 2000))
"""at least; the default ones are always the same"""
KEYS = {"OPENPALM_API_KEY": "client", "OPENPALM_ADMIN_KEY": "operator"}
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("schema") / "base")
    with serving(base, "--dtype", "float32", "--max-sequences", 8, env=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def operations(server):
    return server.call("/openapi.json").body["paths"]


def test_status_422_is_not_documented(operations):
    for path, methods in operations.items():
        for method in methods.values():
            assert "422" not in method["responses"], path


def test_all_other_paths_need_a_key(server, operations):
    for path, methods in operations.items():
        answer = server.call(path, {} if "post" in methods else None)
        assert answer.status == (200 if path in OPEN else 401)


def test_responses_are_as_documented(server, operations, tmp_path):
    wanted = max(1, REQUESTS // sum("post" in methods for methods in operations.values()))
    report = tmp_path / "report.ndjson"
    words = ["--config-file", CONFIG, "run", f"{server.url}/openapi.json", "--no-color"]
    words += ["--max-examples", wanted, "--report-ndjson-path", report]
    words += [] if "OPENPALM_SCHEMA_REQUESTS" in os.environ else ["--seed", 0]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | KEYS,
    )
    sent = list(interactions(report))
    statuses = Counter(status for status, _ in sent)
    print(f"{len(sent)} requests: {dict(statuses.most_common())}")
    assert done.returncode == 0, done.stdout
    assert len(sent) >= REQUESTS
    assert max(statuses) < 500
    assert {200, 400, 404} <= statuses.keys()
    for status, content in sent:
        if status != 200:
            check_error(content)
    server.wait_idle()
    assert server.process.poll() is None


def interactions(report):
    """Status and content of every answer."""
    for event in rows(report):
        recorder = event.get("ScenarioFinished", {}).get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            response = interaction["response"]
            assert response is not None, interaction["request"]
            content = response["content"] or {}
            yield response["status_code"], base64.b64decode(content.get("$base64", ""))


def check_error(content):
    """OpenAI's shape."""
    body = json.loads(content)
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)
