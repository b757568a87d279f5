"""Reward models against people: on prompts that they were not trained on, in the random arm."""

import math

import pytest
from pair_payloads import BOTH_BAD, TIE, A, B

from openpalm.feedback.judgements import submission
from openpalm.feedback.models import (
    ModelScore,
    ModelVersion,
    Snapshot,
    SnapshotJudgement,
    TrainRun,
    User,
)
from openpalm.feedback.statistics.calibration import accuracy_limit
from openpalm.feedback.statistics.intervals import Estimate, wilson


@pytest.fixture
def reward(project):
    """reward("name", responses): a reward model that was trained on these judgements."""

    def make(name, responses=(), parent=None):
        snapshot = Snapshot.objects.create(project=project, digest=name, path=f"{name}.jsonl")
        for response in responses:
            SnapshotJudgement.objects.create(snapshot=snapshot, response=response)
        run = TrainRun.objects.create(project=project, verb="reward", snapshot=snapshot)
        return ModelVersion.objects.create(
            project=project, name=name, kind="reward", run=run, parent=parent
        )

    return make


@pytest.fixture
def scored(make_item):
    """scored(n, {model: margin}): an item; the models score answer 0 by the margin higher."""

    def make(n, margins, arm="random", **fields):
        item = make_item(f"q{n}", "x", "y", needed=9, arm=arm, **fields)
        first, second = item.places.order_by("position")
        for model, margin in margins.items():
            ModelScore.objects.create(model=model, candidate_id=first.candidate_id, score=margin)
            ModelScore.objects.create(model=model, candidate_id=second.candidate_id, score=0.0)
        return item

    return make


@pytest.fixture
def people(member):
    return [member(name) for name in ("ann", "bea")]


def test_accuracy_beside_the_agreement_of_people(people, reward, scored, judge, figures):
    model = reward("rm")
    table = [(2.0, (A, A)), (1.0, (A, B)), (-3.0, (A, A)), (0.5, (TIE, A)), (1.5, (BOTH_BAD, B))]
    for n, (margin, payloads) in enumerate(table):
        item = scored(n, {model: margin})
        for user, payload in zip(people, payloads, strict=True):
            judge(user, item, payload)
    found = figures("reward_agreement")["person"]
    (row,) = found["models"]
    # By prompt, of decided judgements: 1, 1/2, 0, 1, 0.
    assert row["accuracy"]["value"] == pytest.approx(2.5 / 5)
    assert (row["model"], row["judgements"], row["items"]) == (model.pk, 9, 5)
    assert (row["trained_on"], row["unscored"], row["reason"]) == (0, 0, None)
    # Items with two decided judgements: the first three.
    assert found["people"] == pytest.approx(wilson(2, 3)._asdict())
    assert found["limit"] == pytest.approx(accuracy_limit(Estimate(**found["people"]))._asdict())
    squared = [(p - y) ** 2 for margin, choices in _choices(table) for p, y in _of(margin, choices)]
    calibration = figures("calibration")["person"]
    assert calibration["brier"] == pytest.approx(sum(squared) / len(squared))
    assert (calibration["model"], calibration["ties"]) == (model.pk, 1)
    assert sum(one["judgements"] for one in calibration["bins"]) == 9


def _choices(table):
    value = {str(A): 1, str(B): 0, str(TIE): 0.5}
    return [(m, [value[str(p)] for p in payloads if p != BOTH_BAD]) for m, payloads in table]


def _of(margin, choices):
    return [(1 / (1 + math.exp(-margin)), y) for y in choices]


def test_prompts_of_its_snapshots_are_left_out(people, reward, scored, judge, figures):
    """Also those of the model that it was trained from, and other people's judgements of them."""
    items = [scored(n, {}) for n in range(4)]
    responses = [judge(people[0], item, A) for item in items]
    for item in items:
        judge(people[1], item, A)
    first = reward("first", responses[:1])
    second = reward("second", responses[1:2], parent=first)
    for n, item in enumerate(items):
        for model in (first, second):
            for place, score in zip(item.places.order_by("position"), (1.0, 0.0), strict=True):
                sign = -1 if n == 0 else 1
                ModelScore.objects.create(
                    model=model, candidate_id=place.candidate_id, score=sign * score
                )
    rows = figures("reward_agreement")["person"]["models"]
    assert [(row["name"], row["items"], row["trained_on"]) for row in rows] == [
        ("first", 3, 1),
        ("second", 2, 2),
    ]
    assert [row["accuracy"]["value"] for row in rows] == [1, 1]
    assert figures("calibration")["person"]["model"] == second.pk


def test_why_there_is_no_accuracy(people, reward, scored, judge, figures):
    first = reward("nothing yet")
    assert figures("reward_agreement") == {}
    response = judge(people[0], scored(0, {}), A)
    trained = reward("trained on it", [response])
    assert [row["reason"] for row in figures("reward_agreement")["person"]["models"]] == [
        "it has scored none of the 1 judged pairs in the random arm",
        "it was trained on the prompts of all 1 judged pairs in the random arm",
    ]
    submission.change(response.assignment_id, people[0], submission.Judgement("compare", BOTH_BAD))
    rows = figures("reward_agreement")["person"]["models"]
    assert {row["reason"] for row in rows} == {
        "no comparison (none was selected yet) has been judged"
    }
    assert {row["model"] for row in rows} == {first.pk, trained.pk}
    assert figures("calibration") == {}


def test_only_the_random_arm(people, reward, scored, judge, figures):
    model = reward("rm")
    judge(people[0], scored(0, {model: 1.0}, arm=""), A)
    found = figures("reward_agreement")["person"]
    assert (found["arm"], found["models"][0]["accuracy"]["value"]) == ("", 1)
    judge(people[0], scored(1, {model: 1.0}), B)
    judge(people[0], scored(2, {model: 1.0}, arm="active"), A)
    judge(people[0], scored(3, {model: 1.0}, purpose="comparison"), A)
    gold = scored(4, {model: 1.0}, purpose="gold", gold=A, gold_kind="compare")
    judge(people[0], gold, A)
    judge(people[0], scored(5, {model: 1.0}), A, repeat=1)
    submission.delete(judge(people[0], scored(6, {model: 1.0}), A).pk)
    found = figures("reward_agreement")["person"]
    row = found["models"][0]
    assert (found["arm"], row["accuracy"]["value"], row["judgements"]) == ("random", 0, 1)


def test_models_and_simulated_labelers_never_count_among_people(
    people, member, reward, scored, judge, figures
):
    model = reward("rm")
    item = scored(0, {model: 1.0})
    judge(people[0], item, A)
    before = figures("reward_agreement")["person"]
    judge(member("sim", kind=User.Kind.SIMULATED), item, B)
    judge(member("judge", kind=User.Kind.MODEL), item, B)
    found = figures("reward_agreement")
    assert found["person"] == before
    assert set(found) == {"person", "simulated"}
    assert found["simulated"]["models"][0]["accuracy"]["value"] == 0


def test_largest_disagreements_first(people, reward, scored, judge, figures):
    model = reward("rm")
    margins = [1.0, 4.0, -2.0, 9.0, 3.0]
    given = [B, B, A, A, TIE]
    items = [scored(n, {model: margin}) for n, margin in enumerate(margins)]
    for item, payload in zip(items, given, strict=True):
        judge(people[0], item, payload)
    found = figures("disagreements")
    assert (found["model"], found["author_kind"]) == (model.pk, "person")
    assert found["rows"] == [
        {"item": items[1].pk, "margin": 4.0, "people": 0.0, "judgements": 1},
        {"item": items[2].pk, "margin": -2.0, "people": 1.0, "judgements": 1},
        {"item": items[0].pk, "margin": 1.0, "people": 0.0, "judgements": 1},
    ]
