"""The pages show the figures as the worker really computes them."""

import pytest
from django.urls import reverse
from django.utils import timezone

from openpalm.feedback.models import (
    Assignment,
    Candidate,
    ModelScore,
    ModelVersion,
    Project,
    Response,
)
from openpalm.feedback.quality.compute import compute

ITEMS = 30


@pytest.fixture
def computed(project, member, make_item):
    """Two people judged the random arm; they differ on every third item, and so does the model."""
    policies = [
        ModelVersion.objects.create(project=project, name=name, path="/none")
        for name in ("old", "new")
    ]
    reward = ModelVersion.objects.create(project=project, name="taste", kind="reward", path="/r")
    people = [member("ann"), member("bob")]
    for n in range(ITEMS):
        item = make_item(f"question {n}", "short", "longer answer", needed=2, arm="random")
        for place, policy in zip(item.places.all(), policies, strict=True):
            Candidate.objects.filter(pk=place.candidate_id).update(model=policy)
            score = float(place.position) * (-2 if n % 3 == 0 else 2)
            ModelScore.objects.create(model=reward, candidate_id=place.candidate_id, score=score)
        for user in people:
            choose(item, user, 0 if n % 3 == 0 and user == people[1] else 1)
    compute(project)
    return reward


def choose(item, user, better: int) -> None:
    now = timezone.now()
    assignment = Assignment.objects.create(
        item=item, user=user, project=item.project, order=[0, 1], leased_at=now, expires_at=now
    )
    Response.objects.create(
        project=item.project,
        item=item,
        user=user,
        assignment=assignment,
        author_kind=user.kind,
        state=Response.State.SUBMITTED,
        kind="compare",
        payload={"better": better, "worse": 1 - better, "strength": 1},
        category=1 if better else -1,
        picked_place=better,
        elapsed_ms=5000,
    )


def test_the_loop_page(computed, admin, signed_in):
    response = signed_in(admin).get("/p/demo/loop")
    (shown,) = response.context["agreements"]
    assert (shown["kind"], shown["is_random"]) == ("person", True)
    # People agree on two thirds; the model is right on those and once on each of the others.
    assert shown["ceiling"]["value"] == pytest.approx(2 / 3)
    assert shown["newest"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert shown["newest"]["judgements"] == 2 * ITEMS
    assert shown["calibration_plot"] is not None
    page = response.content.decode()
    assert "83.3 %" in page
    assert "66.7 %" in page


def test_the_quality_page(computed, admin, signed_in):
    (group,) = signed_in(admin).get("/p/demo/quality").context["groups"]
    assert [row["name"] for row in group["labelers"]] == ["ann", "bob"]
    assert {row["median_s"] for row in group["labelers"]} == {5.0}
    assert group["labelers"][0]["others"]["words"].startswith("66.7 %")
    assert {bar["name"] for bar in group["agreement"]} >= {
        "raw agreement",
        "Krippendorff's alpha",
        "Gwet's AC1 or AC2",
    }
    assert group["left"] is not None


def test_the_board(computed, admin, signed_in):
    response = signed_in(admin).get("/p/demo/board")
    (board,) = response.context["boards"]
    ((first, second),) = board["groups"]
    assert (first["model"], second["model"]) == ("new", "old")
    assert first["plain"]["plot"] is not None
    assert first["wins"] == ""
    new, old = (ModelVersion.objects.get(name=name) for name in ("new", "old"))
    assert reverse("model", args=["demo", new.pk]) in response.content.decode()
    Project.objects.update(served=old)
    page = signed_in(admin).get("/p/demo/board").content.decode()
    assert "Wins against old" in page
    # A third of the judgements of the second labeler are for the old model: 50 of 60 are not.
    assert "83.3 %" in page


def test_the_form_counts_judgements(computed, admin, signed_in):
    page = signed_in(admin).get("/p/demo/runs/new?verb=dpo").content.decode()
    assert f"people ({2 * ITEMS})" in page
