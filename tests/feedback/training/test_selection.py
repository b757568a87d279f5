"""The next batch: the arms, what the active arm rests on, scores that are missing."""

import pytest
from feedback_prompts import add_prompts

from openpalm.feedback.items.new_items import make_item
from openpalm.feedback.models import Item, ModelScore, TrainRun
from openpalm.feedback.statistics.selection import in_reserve
from openpalm.feedback.training import selection
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.loop import drain

SIZE = 10


@pytest.fixture
def pool(project):
    """Forty items; the answers of every second one have lengths far apart."""
    items = []
    for number, prompt in enumerate(add_prompts(project, 40)):
        texts = ["x", "y" * (30 if number % 2 else 1)]
        candidates = [prompt.candidates.create(text=text) for text in texts]
        items.append(make_item(project, prompt, candidates))
    return items


@pytest.fixture
def ensemble(project, model):
    """Two reward models of one training."""
    run = TrainRun.objects.create(project=project, verb="reward")
    return [model(name, "reward", run=run) for name in ("r1", "r2")]


def _select(project, size=SIZE):
    job = jobs.enqueue("select", project=project, size=size)
    drain("select", "score")
    job.refresh_from_db()
    return job


def test_without_reward_models_all_is_chance(project, pool):
    job = _select(project)
    assert job.state == "done", job.message
    assert (job.result["random"], job.result["active"]) == (3, 7)
    assert job.result["by"] == []
    chosen = Item.objects.exclude(arm="")
    assert chosen.count() == SIZE
    for item in chosen:
        assert (item.arm == "random") == in_reserve(item.prompt_id, project_seed=project.pk)
        assert 9 < item.priority <= 10
    # The next batch takes others.
    first = set(chosen.values_list("id", flat=True))
    _select(project)
    assert first < set(Item.objects.exclude(arm="").values_list("id", flat=True))
    assert Item.objects.filter(arm="").count() == 40 - 2 * SIZE


def test_the_active_arm_is_where_the_ensemble_disagrees(project, pool, ensemble):
    first, second = ensemble
    assert selection.ensemble(project) == ensemble
    torn = [item for item in pool if not in_reserve(item.prompt_id, project_seed=project.pk)][:7]
    for item in pool:
        a, b = (place.candidate for place in item.places.all())
        gap = 4.0 if item in torn else 0.1
        for each, sign in ((first, 1), (second, -1)):
            ModelScore.objects.create(model=each, candidate=a, score=sign * gap)
            ModelScore.objects.create(model=each, candidate=b, score=0.0)
    job = _select(project)
    assert job.result["by"] == ["the reward ensemble's disagreement"]
    active = set(Item.objects.filter(arm="active").values_list("id", flat=True))
    assert active == {item.pk for item in torn}


def test_missing_scores_are_computed_first(project, pool, ensemble):
    job = _select(project)
    assert job.state == "done", job.message
    # The stand-in scores by length, the same for both: no disagreement, but scores.
    assert [each.scores.count() for each in ensemble] == [80, 80]


def test_a_policy_counts_beside_its_parent(project, pool, model):
    base = model("base")
    run = TrainRun.objects.create(project=project, verb="dpo", settings={"beta": 1.0})
    policy = model("next", run=run, parent=base)
    undecided = [i for i in pool if not in_reserve(i.prompt_id, project_seed=project.pk)][:7]
    for item in pool:
        a, b = (place.candidate for place in item.places.all())
        for candidate, gain in ((a, 0.0 if item in undecided else 5.0), (b, 0.0)):
            ModelScore.objects.create(model=base, candidate=candidate, score=-3.0)
            ModelScore.objects.create(model=policy, candidate=candidate, score=-3.0 + gain)
    job = _select(project)
    assert job.result["by"] == ["the margin of the policy's implicit rewards"]
    active = set(Item.objects.filter(arm="active").values_list("id", flat=True))
    assert active == {item.pk for item in undecided}


def test_items_that_someone_has_are_left_alone(project, pool, judge, member):
    judge(pool[0], member("ann"))
    _select(project, size=40)
    pool[0].refresh_from_db()
    assert pool[0].arm == ""
    assert Item.objects.exclude(arm="").count() == 39


def test_nothing_is_left(project):
    job = _select(project)
    assert (job.state, job.message) == (
        "failed",
        "every pair of answers is judged or waits to be: generate further answers first",
    )


def test_the_pool_has_no_comparison_and_no_gold(project, make_item):
    make_item("a", "x", "y", purpose=Item.Purpose.COMPARISON)
    make_item("b", "x", "y", purpose=Item.Purpose.GOLD, gold={"better": 0})
    assert _select(project).state == "failed"
