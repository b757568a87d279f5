"""Alarms: a reward that rises while labelers see no gain, and answers that only grow."""

import numpy as np
import pytest
from pair_payloads import A, B

from openpalm.feedback.models import Candidate, ModelScore, ModelVersion, TrainRun, User
from openpalm.feedback.quality.alarms import MINIMUM, mean_interval


@pytest.fixture
def trained(project):
    """Parent, policy, and the reward model that the policy was trained with."""
    parent = ModelVersion.objects.create(project=project, name="parent")
    reward = ModelVersion.objects.create(project=project, name="rm", kind="reward")
    run = TrainRun.objects.create(project=project, verb="ppo", reward_model=reward)
    policy = ModelVersion.objects.create(project=project, name="policy", parent=parent, run=run)
    ModelVersion.objects.create(project=project, name="newer rm", kind="reward")
    return parent, policy, reward


@pytest.fixture
def answered(trained, make_item):
    """answered(n, rise): an item with the policy's answer and its parent's, in turns."""
    parent, policy, reward = trained

    def make(n, rise=1.0, longer=1):
        texts = ["word " * 4, "word " * 4 * longer]
        models = [parent, policy]
        if n % 2:
            texts, models = texts[::-1], models[::-1]
        item = make_item(f"q{n}", *texts, needed=9)
        for place, model in zip(item.places.order_by("position"), models, strict=True):
            Candidate.objects.filter(pk=place.candidate_id).update(model=model)
            score = n / 10 + (rise + n % 3 / 10 if model == policy else 0)
            ModelScore.objects.create(model=reward, candidate_id=place.candidate_id, score=score)
        return item, (A if n % 2 else B), (B if n % 2 else A)

    return make


def lines(figures):
    return [(row["kind"], row["name"]) for row in figures("alarms")["rows"]]


def test_a_rising_reward_that_people_do_not_see(member, answered, judge, figures):
    for n in range(MINIMUM):
        item, for_policy, for_parent = answered(n)
        judge(member("ann"), item, for_parent if n % 4 else for_policy)
    (row,) = figures("alarms")["rows"]
    assert (row["kind"], row["name"]) == ("gamed_reward", "policy")
    assert "The reward of rm rises by 1.1" in row["line"]
    assert "only 25% of 20 prompts" in row["line"]


@pytest.mark.parametrize(
    ("rise", "prompts", "policy_wins"),
    [(1.0, MINIMUM, 11), (-1.0, MINIMUM, 5), (1.0, MINIMUM - 1, 5)],
    ids=["people see the gain", "the reward falls", "too few prompts"],
)
def test_no_alarm(member, answered, judge, figures, rise, prompts, policy_wins):
    for n in range(prompts):
        item, for_policy, for_parent = answered(n, rise)
        judge(member("ann"), item, for_policy if n < policy_wins else for_parent)
    assert lines(figures) == []


def test_only_people_raise_the_alarm(project, member, answered, judge, figures):
    """Judges and simulated labelers see no gain; people do."""
    sim, machine = (member(kind, kind=kind) for kind in (User.Kind.SIMULATED, User.Kind.MODEL))
    for n in range(MINIMUM):
        item, for_policy, for_parent = answered(n)
        judge(member("ann"), item, for_policy)
        judge(sim, item, for_parent)
        judge(machine, item, for_parent)
    assert lines(figures) == []
    project.decided_by = User.Kind.SIMULATED
    project.save()
    assert lines(figures) == [("gamed_reward", "policy")]


def test_answers_that_grow(answered, figures):
    for n in range(MINIMUM):
        answered(n, longer=2)
    (row,) = figures("alarms")["rows"]
    assert row["kind"] == "length"
    assert "2.0 times as long as those of parent" in row["line"]


def test_answers_that_grow_a_little(answered, figures):
    for n in range(MINIMUM):
        answered(n)
    assert lines(figures) == []


def test_interval_of_a_mean():
    # Student's t with 4 degrees of freedom: 2.776
    found = mean_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert found is not None
    half = 2.776445 * np.sqrt(2.5) / np.sqrt(5)
    assert found == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert mean_interval(np.array([1.0])) is None
