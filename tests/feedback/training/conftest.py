"""A project with judged items and models, and a stand-in for the openpalm command."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
from model_server import fake_server

from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import ModelVersion, Project, Response, User
from openpalm.feedback.worker import processes

HELPERS = Path(__file__).parents[2] / "helpers"


@pytest.fixture(autouse=True)
def site(settings, tmp_path, monkeypatch):
    """The site's folder. A worker runs its jobs without threads of its own."""
    settings.FEEDBACK_HEARTBEAT = False
    settings.FEEDBACK_DIR = tmp_path / "site"
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, str(HELPERS / "fake_openpalm.py")))
    monkeypatch.setattr(processes, "POLL_S", 0.01)
    return tmp_path / "site"


@pytest.fixture
def model(project, tmp_path):
    """model("base"): a model of the project with a checkpoint."""

    def make(name: str, kind: str = "policy", in_project: Project | None = None, **fields):
        path = tmp_path / "models" / name
        path.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(name.encode()).hexdigest()
        (path / "manifest.json").write_text(json.dumps({"sha256": digest}))
        return ModelVersion.objects.create(
            project=in_project or project,
            name=name,
            kind=kind,
            path=str(path),
            checkpoint=digest,
            **fields,
        )

    return make


@pytest.fixture
def judge():
    """judge(item, user, better=0): the user's judgement of an item, through a lease."""

    def give(item, user: User, better: int | None = 0, **payload) -> Response:
        assignment = queue._lease(item, user, item.project, counted=True)
        worse = {0: 1, 1: 0, None: None}[better]
        chosen = payload or {"better": better, "worse": worse, "strength": 1}
        kind = "edit" if "text" in chosen else "compare"
        return submission.submit(assignment.pk, user, Judgement(kind, chosen, 1000))

    return give


@pytest.fixture
def server(settings):
    """A model server that the site knows."""
    with fake_server() as running:
        settings.SERVER_URL = running.url
        settings.SERVER_ADMIN_KEY = running.admin_key
        yield running
