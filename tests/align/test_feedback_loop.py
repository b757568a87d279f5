"""What proofs/feedback_loop.py and proofs/judgement_curve.py rest on."""

import random

import enumerable
import feedback_loop
import judgement_curve
import pytest
import replies
import site_refusal
import torch
from prove import drawn_pairs
from simulated_judging import Item, WithoutSite

from openpalm.data.rows.preferences import Preference, pairs_from_preferences


@pytest.fixture(scope="module")
def judged():
    drawn, asked = random.Random(0), replies.questions()
    items = [Item(q, replies.reply(drawn, q), replies.reply(drawn, q)) for q in asked]
    return items, WithoutSite().collect("test", items, seed=0)


def test_judgements_are_records_that_give_pairs(judged):
    records = [Preference.from_json(one.record, "record") for one in judged[1]]
    assert {record.author_kind for record in records} == {"simulated"}
    assert len(pairs_from_preferences(records).items) > 0.8 * len(records)


def test_judgements_are_noisy_and_know_more_than_chance(judged):
    items, made = judged
    found = feedback_loop.judgements_agreement(made, items)
    assert found is not None
    assert 0.65 < found[0] < 0.9


def test_shuffled_verdicts_are_the_same_ones_and_agree_with_nothing(judged):
    items, made = judged
    control = feedback_loop.with_shuffled_verdicts(made, seed=0)
    verdicts = [sorted(str(one.record["payload"]) for one in each) for each in (made, control)]
    assert verdicts[0] == verdicts[1]
    found = feedback_loop.judgements_agreement(control, items)
    assert found is not None
    assert found[1] < 0.5 < found[2]


@pytest.mark.parametrize("step", [1, -1])
def test_a_verdict_names_the_same_text_on_either_side(judged, step):
    record = next(one.record for one in judged[1] if "better" in one.record["payload"])
    shown = record["candidates"][::step]
    assignment = {"messages": record["prompt"], "candidates": shown}
    given = site_refusal.verdicts([record])(assignment)
    assert shown[given["better"]] == record["candidates"][record["payload"]["better"]]
    assert {given["better"], given["worse"]} == {0, 1}


def test_no_held_out_question_is_trained_on(tmp_path):
    run = feedback_loop.Seed(tmp_path, 3)
    assert not {*run.questions(held_out=True)} & {*run.questions(held_out=False)}


def test_known_form_is_the_optimum_that_another_optimizer_finds():
    task = enumerable.make(0)
    pairs = drawn_pairs(task, 0, 200)
    x = judgement_curve.features()
    p, better, worse = torch.tensor(pairs).T
    rows = x[p, better] - x[p, worse]
    weights = torch.zeros(rows.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(rows @ weights).sum() + weights.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    members = judgement_curve.known_form(task, pairs, seed=0)
    assert members.std(dim=0).min() > 0
    torch.testing.assert_close(members.mean(dim=0), x @ weights.detach(), atol=1e-3, rtol=1e-3)


def test_reached_is_between_the_sizes_around_the_goal():
    assert judgement_curve.reached([100, 400], [0.8, 1.0]) == pytest.approx(200)
    assert judgement_curve.reached([100, 400], [0.8, 0.85]) == float("inf")
