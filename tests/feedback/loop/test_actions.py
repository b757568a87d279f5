"""What managers do on the pages of the loop: each is checked, done once, and in the audit log."""

import json

import pytest

from openpalm.feedback.model_server import site_server
from openpalm.feedback.models import (
    Comparison,
    Event,
    Job,
    ModelVersion,
    Project,
    Promotion,
    Response,
    Role,
    TrainRun,
)


@pytest.fixture
def client(admin, signed_in):
    return signed_in(admin)


@pytest.fixture
def server(settings):
    settings.SERVER_URL, settings.SERVER_ADMIN_KEY = "http://127.0.0.1:9", "key"


def last_event():
    return Event.objects.order_by("-id").values_list("action", flat=True).first()


def said(response):
    return " ".join(str(message) for message in response.context["messages"])


# --- the next batch


def test_the_next_batch_is_queued(loop, client):
    client.post("/p/demo/loop/next-batch", {"size": 20})
    job = Job.objects.get(kind="select")
    assert (job.arguments, job.project) == ({"size": 20}, loop.project)
    assert last_event() == "job.select"


@pytest.mark.parametrize("size", ["0", "x", "", "999999"])
def test_a_wrong_size_is_refused(loop, client, size):
    response = client.post("/p/demo/loop/next-batch", {"size": size}, follow=True)
    assert "Pairs: " in said(response)
    assert not Job.objects.exists()


# --- trainings


def form(loop, **changes):
    given = {"parent": loop.base.pk, "authors": ["person"], "members": 2, "loss": "dpo", "seed": 0}
    return given | changes


def settings_of(run):
    return {name: value for name, value in run.settings.items() if name != "filter"}


def test_a_training_starts_with_its_settings(loop, client):
    given = form(loop, steps=7, lr="0.001", name="taste")
    response = client.post("/p/demo/runs/new?verb=reward", given)
    run = TrainRun.objects.order_by("-id")[0]
    assert response.url == f"/p/demo/runs/{run.pk}"
    assert run.settings["filter"]["author_kinds"] == ["person"]
    own = {"steps": 7, "optim.lr": 0.001, "members": 2, "seed": 0, "name": "taste"}
    assert settings_of(run) == own
    assert last_event() == "training.started"


def test_defaults_are_left_to_the_command(loop, client):
    client.post("/p/demo/runs/new?verb=dpo", form(loop))
    run = TrainRun.objects.order_by("-id")[0]
    assert run.verb == "dpo"
    assert settings_of(run) == {"epochs": 2, "seed": 0, "loss": "dpo"}


def test_a_reward_model_learns_one_axis_of_ratings(loop, client):
    Project.objects.update(task="rating", axes=["truth", "style"])
    Response.objects.update(kind="rate", payload={"ratings": {"truth": 5, "style": 1}})
    client.post("/p/demo/runs/new?verb=reward", form(loop, axis="truth"))
    run = TrainRun.objects.order_by("-id")[0]
    assert (run.settings["loss"], run.settings["axis"]) == ("regression", "truth")
    client.post("/p/demo/runs/new?verb=reward", form(loop, axis=""))
    assert "loss" not in TrainRun.objects.order_by("-id")[0].settings
    assert client.post("/p/demo/runs/new", form(loop, axis="none")).status_code == 422


def test_a_reward_model_leaves_out_the_random_arm_unless_unticked(loop, client):
    page = client.get("/p/demo/runs/new?verb=reward")
    assert page.context["form"]["hold_back"].value() is True
    for ticked in ({"hold_back": "on"}, {}):
        client.post("/p/demo/runs/new?verb=reward", form(loop, **ticked))
        run = TrainRun.objects.order_by("-id")[0]
        assert run.settings["filter"]["hold_back"] == bool(ticked)


def test_thumbs_are_trained_on_with_kto(loop, client):
    Project.objects.update(task="thumbs")
    page = client.get("/p/demo/runs/new?verb=dpo")
    assert page.context["form"]["loss"].value() == "kto"


def test_ppo_takes_a_reward_model_and_no_judgements(loop, client):
    given = {"parent": loop.base.pk, "reward": loop.reward.pk, "seed": 0, "kl_coef": "0.1"}
    client.post("/p/demo/runs/new?verb=ppo", given)
    run = TrainRun.objects.order_by("-id")[0]
    assert (run.verb, run.reward_model, run.settings["kl_coef"]) == ("ppo", loop.reward, 0.1)
    assert "filter" not in run.settings


def test_an_ensemble_is_one_choice(loop, client):
    for n in range(2):
        ModelVersion.objects.create(
            project=loop.project, name=f"more-{n}", kind="reward", run=loop.reward.run, path="/m"
        )
    ModelVersion.objects.create(project=loop.project, name="added", kind="reward", path="/a")
    field = client.get("/p/demo/runs/new?verb=ppo").context["form"].fields["reward"]
    labels = {label for value, label in field.choices if value}
    assert labels == {"judge-of-taste (ensemble of 3)", "added"}


def test_a_policy_is_no_reward_model(loop, client):
    given = {"parent": loop.base.pk, "reward": loop.challenger.pk, "seed": 0}
    assert client.post("/p/demo/runs/new?verb=ppo", given).status_code == 422


def test_without_judgements_of_that_kind_nothing_starts(loop, client):
    response = client.post("/p/demo/runs/new?verb=reward", form(loop, authors=["model"]))
    assert response.status_code == 422
    assert "There is nothing for reward to train on" in response.content.decode()
    assert not Job.objects.exists()


def test_a_model_of_another_project_cannot_be_trained(loop, client):
    other = Project.objects.create(slug="other", name="Other")
    foreign = ModelVersion.objects.create(project=other, name="theirs", path="/none")
    response = client.post("/p/demo/runs/new?verb=reward", form(loop, parent=foreign.pk))
    assert response.status_code == 422


def test_the_form_says_how_many_judgements_there_are(loop, client, store):
    rows = [{"author_kind": kind, "judgements": n} for kind, n in (("person", 1200), ("model", 3))]
    store("labelers", {"rows": [*rows, rows[0]]})
    page = client.get("/p/demo/runs/new?verb=reward").content.decode()
    assert "people (2,400)" in page
    assert "models as judges (3)" in page


def test_stopping_and_continuing(loop, client):
    Job.objects.create(
        project=loop.project, kind="train", arguments={"run": loop.run.pk}, state="running"
    )
    client.post(f"/p/demo/runs/{loop.run.pk}/stop")
    loop.run.refresh_from_db()
    assert (loop.run.state, last_event()) == ("stopped", "training.stopped")
    client.post(f"/p/demo/runs/{loop.run.pk}/resume")
    loop.run.refresh_from_db()
    assert (loop.run.state, last_event()) == ("queued", "training.resumed")


# --- comparison and promotion


def test_a_comparison_without_held_out_prompts_says_so(loop, client):
    given = {"size": 200, "temperature": 1, "max_tokens": 64}
    path = f"/p/demo/models/{loop.challenger.pk}/compare"
    response = client.post(path, given, follow=True)
    assert "0 held-out prompts were never trained on" in said(response)
    assert Comparison.objects.count() == 1


def test_promotion_after_a_decided_comparison(loop, client, decided, server):
    comparison = decided()
    client.post(f"/p/demo/models/{loop.challenger.pk}/promote", {"comparison": comparison.pk})
    promotion = Promotion.objects.order_by("-id")[0]
    assert (promotion.model, promotion.comparison) == (loop.challenger, comparison)
    assert promotion.override_reason == ""
    assert Job.objects.get().kind == "promote"
    assert last_event() == "model.promotion_proposed"
    page = client.get(f"/p/demo/comparisons/{comparison.pk}").content.decode()
    assert "The server is loading challenger" in page
    assert "Promote: serve" not in page


@pytest.mark.parametrize("reason", ["", "too short"])
def test_promotion_is_refused_without_the_interval_above_one_half(
    loop, client, decided, server, reason
):
    comparison = decided(low=0.49, decision="more_needed", reason="Undecided")
    given = {"comparison": comparison.pk, "override_reason": reason}
    path = f"/p/demo/models/{loop.challenger.pk}/promote"
    response = client.post(path, given, follow=True)
    assert "Refused: Undecided" in said(response)
    assert not Job.objects.exists()


def test_an_override_needs_a_reason_that_the_audit_keeps(loop, client, decided, server):
    comparison = decided(low=0.49, decision="more_needed", reason="Undecided")
    reason = "the old one swears at children"
    given = {"comparison": comparison.pk, "override_reason": reason}
    client.post(f"/p/demo/models/{loop.challenger.pk}/promote", given)
    event = Event.objects.order_by("-id")[0]
    assert event.action == "model.promotion_overridden"
    assert event.data["reason"] == reason
    assert reason in client.get(f"/p/demo/comparisons/{comparison.pk}").content.decode()


def test_without_a_server_nothing_is_promoted(loop, client, decided):
    comparison = decided()
    path = f"/p/demo/models/{loop.challenger.pk}/promote"
    response = client.post(path, {"comparison": comparison.pk}, follow=True)
    assert "No model server is connected" in said(response)


def test_undoing_a_promotion(loop, client, server):
    loop.promotion.previous = loop.challenger
    loop.promotion.save()
    client.post(f"/p/demo/promotions/{loop.promotion.pk}/undo")
    assert Job.objects.get().arguments == {"promotion": loop.promotion.pk, "undo": True}
    assert last_event() == "model.promotion_undo_asked"


def test_an_undecided_comparison_gets_further_pairs_only_if_there_are_prompts(
    loop, client, decided
):
    comparison = decided(decision="more_needed")
    path = f"/p/demo/comparisons/{comparison.pk}/extend"
    response = client.post(path, {"further": 50}, follow=True)
    assert "held-out prompts are left" in said(response)


# --- models


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "cd" * 32}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_an_administrator_adds_a_checkpoint(loop, client, checkpoint, kind):
    given = {"path": str(checkpoint), "name": "mine", "kind": kind}
    client.post("/p/demo/models/new", given)
    model = ModelVersion.objects.get(name="mine")
    assert (model.kind, model.checkpoint) == (kind, "cd" * 32)
    assert last_event() == "model.registered"


def test_a_path_without_a_checkpoint_is_refused(loop, client, tmp_path):
    given = {"path": str(tmp_path), "name": "mine", "kind": "policy"}
    response = client.post("/p/demo/models/new", given)
    assert response.status_code == 422
    assert "holds no checkpoint" in response.content.decode()


def test_managers_of_a_project_cannot_name_paths(loop, member, signed_in, checkpoint):
    """A path could be a checkpoint of a project that they do not belong to."""
    given = {"path": str(checkpoint), "name": "theirs", "kind": "policy"}
    response = signed_in(member("olga", Role.OWNER)).post("/p/demo/models/new", given)
    assert response.status_code == 422
    assert not ModelVersion.objects.filter(name="theirs").exists()


def test_the_first_served_model_is_chosen_once(loop, client):
    path = f"/p/demo/models/{loop.challenger.pk}/choose"
    assert "Only the first served model" in said(client.post(path, follow=True))
    Project.objects.update(served=None)
    client.post(path)
    assert Project.objects.get(slug="demo").served == loop.challenger
    assert last_event() == "model.served"


def test_a_connected_server_has_its_model_by_promotion_only(loop, client, server):
    Project.objects.update(served=None)
    client.post(f"/p/demo/models/{loop.challenger.pk}/choose")
    assert Project.objects.get(slug="demo").served is None
    assert site_server() is not None


def test_rescoring(loop, client):
    client.post(f"/p/demo/models/{loop.reward.pk}/score")
    assert Job.objects.get().arguments == {"model": loop.reward.pk}
    response = client.post(f"/p/demo/models/{loop.base.pk}/score", follow=True)
    assert "Only a reward model" in said(response)


# --- rights


def test_reviewers_act_on_nothing(loop, member, signed_in):
    client = signed_in(member("rita", Role.REVIEWER))
    model, run = loop.challenger.pk, loop.run.pk
    for path in (
        "loop/next-batch",
        "runs/new",
        f"runs/{run}/stop",
        f"runs/{run}/resume",
        f"models/{model}/compare",
        f"models/{model}/promote",
        f"models/{model}/choose",
        f"models/{model}/score",
        f"comparisons/{loop.comparison.pk}/extend",
        f"promotions/{loop.promotion.pk}/undo",
    ):
        assert client.post(f"/p/demo/{path}").status_code == 403, path
    assert not Job.objects.exists()


def test_ids_of_another_project_are_not_found(loop, client):
    Project.objects.create(slug="other", name="Other")
    for path in (
        f"runs/{loop.run.pk}",
        f"models/{loop.base.pk}",
        f"snapshots/{loop.snapshot.pk}",
        f"comparisons/{loop.comparison.pk}",
    ):
        assert client.get(f"/p/other/{path}").status_code == 404, path
    for path in (
        f"runs/{loop.run.pk}/stop",
        f"models/{loop.base.pk}/score",
        f"models/{loop.base.pk}/promote",
        f"promotions/{loop.promotion.pk}/undo",
    ):
        assert client.post(f"/p/other/{path}").status_code == 404, path
