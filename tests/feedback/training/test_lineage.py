"""Lineage both ways: judgements of a model, models of a judgement; scores; the served model."""

import json

import pytest

from openpalm.cli import serve_feedback
from openpalm.cli.serve import ServeSettings
from openpalm.errors import DataError
from openpalm.feedback.accounts.tokens import digest_of
from openpalm.feedback.models import ApiToken, ModelVersion, Project, TrainRun, User
from openpalm.feedback.training import runs, scoring, served
from openpalm.feedback.training.lineage import ancestors, judgements_of, models_of
from openpalm.feedback.training.registry import free_name, register
from openpalm.feedback.training.servers import SERVED_FILE
from openpalm.feedback.training.snapshots import Filter
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.loop import drain


def test_down_to_each_judgement_and_back(project, model, admin, make_item, judge, member):
    base = model("base")
    first = judge(make_item("one", "a", "b"), member("ann"))
    reward = runs.start(project, "reward", admin, parent=base, settings={"members": 2})
    drain("train")
    second = judge(make_item("two", "a", "b"), member("bob"))
    only_second = Filter(users=[member("bob").pk])
    dpo = runs.start(project, "dpo", admin, parent=base, chosen=only_second)
    drain("train")
    policy = ModelVersion.objects.get(run=dpo)
    both = list(ModelVersion.objects.filter(run=reward).order_by("id"))
    first_reward = both[0]
    ppo = runs.start(project, "ppo", admin, parent=policy, reward=first_reward)
    drain("train")
    third = judge(make_item("three", "a", "b"), member("ann"))
    final = ModelVersion.objects.get(run=ppo)
    assert [m.name for m in ancestors(final)] == [f"ppo-{ppo.pk}", f"dpo-{dpo.pk}", "base"]
    assert list(judgements_of(final)) == [first, second]
    assert list(judgements_of(first_reward)) == [first]
    assert list(judgements_of(base)) == []
    assert models_of([first]) == [*both, final]
    assert models_of([second]) == [policy, final]
    assert models_of([third]) == []


def test_scores_are_made_once_and_too_long_ones_counted(project, model, admin, make_item):
    make_item("question", "short", "longer one")
    make_item("other", "long", "x")
    reward = model("r", "reward")
    job = jobs.enqueue("score", project=project, model=reward.pk)
    drain("score")
    job.refresh_from_db()
    assert job.result == {"scored": 3, "too_long": 1}, job.message
    scores = {s.candidate.text: s.score for s in reward.scores.select_related("candidate")}
    assert scores == {"short": 5.0, "longer one": 10.0, "x": 1.0}
    make_item("new", "seven..", "y")
    again = jobs.enqueue("score", project=project, model=reward.pk)
    drain("score")
    again.refresh_from_db()
    assert again.result["scored"] == 2
    assert reward.scores.count() == 5


def test_a_model_without_a_checkpoint_scores_nothing(project, model):
    known = ModelVersion.objects.create(project=project, name="gone")
    job = jobs.enqueue("score", project=project, model=known.pk)
    drain("score")
    job.refresh_from_db()
    assert job.state == "failed"
    assert job.message == "the model gone has no checkpoint to score with"


def test_a_run_stands_for_its_newest_whole_checkpoint(project, tmp_path):
    for step, digest in ((1, "a"), (2, "b")):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"sha256": digest}))
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir()  # not written to its end
    found = register(project, tmp_path / "run", name="run")
    assert (found.checkpoint, found.path.endswith("step-00000002")) == ("b", True)
    assert register(project, tmp_path / "run", name="again") == found
    assert free_name(project, "run") == "run-2"
    with pytest.raises(DataError, match="holds no checkpoint"):
        register(project, tmp_path, name="x")


def test_the_first_project_is_made_with_the_served_model(db, tmp_path, settings):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text('{"sha256": "abc"}')
    settings.FEEDBACK_DIR.mkdir()
    (settings.FEEDBACK_DIR / SERVED_FILE).write_text('{"path": "/runs/promoted"}')
    first = served.connect(str(tmp_path / "model"), "sft")
    project = Project.objects.get()
    assert (first.model.path, first.promoted) == (str(tmp_path / "model"), "/runs/promoted")
    assert (first.project.slug, project.name) == (project.slug, "Answers of sft")
    assert project.served == ModelVersion.objects.get(name="sft", checkpoint="abc")
    assert project.guideline is not None
    assert not (settings.FEEDBACK_DIR / SERVED_FILE).exists()
    token = ApiToken.objects.get(digest=digest_of(first.token))
    assert (token.scopes, token.project) == ([served.SCOPE], project)
    user = User.objects.get()
    assert (user.kind, user.has_usable_password()) == ("model", False)
    # The next start: the same project and model, another token.
    second = served.connect(str(tmp_path / "model"), "sft")
    assert second.promoted is None
    assert Project.objects.count() == ModelVersion.objects.count() == 1
    in_force = ApiToken.objects.filter(revoked_at=None)
    assert in_force.get().digest == digest_of(second.token)


def test_a_crashed_server_starts_with_the_promoted_model(model, settings, tmp_path):
    first, promoted = model("first"), model("promoted")
    given = ServeSettings(path=first.path, adapter="cat=runs/cat")
    server = serve_feedback._server(given, 8000, "http://host:8000", "http://host:8080", [], ["k"])
    words = [*server.command()]
    assert first.path in words
    assert "--adapter" in words
    file = settings.FEEDBACK_DIR / SERVED_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"path": promoted.path}))
    words = [*server.command()]
    assert promoted.path in words
    assert "--adapter" not in words, "adapters are of the first model"
    file.write_text(json.dumps({"path": str(tmp_path / "removed since")}))
    assert first.path in server.command()


def test_a_failed_score_says_why(project, model, make_item, monkeypatch):
    make_item("question", "a", "b")
    monkeypatch.setattr(scoring.jsonl, "write_rows", lambda path, rows: 2)  # no file to read
    job = jobs.enqueue("score", project=project, model=model("r", "reward").pk)
    drain("score")
    job.refresh_from_db()
    assert job.state == "failed"
    assert job.message.startswith("openpalm score: FileNotFoundError")
    assert TrainRun.objects.count() == 0
