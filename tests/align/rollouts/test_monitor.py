"""Evaluations on held-out prompts, and early stopping."""

import copy
import re
from functools import partial

import pytest
import torch
from enumerable import END, INDEX, PROMPTS
from rollouts import enumerated, grpo, moved, task

from openpalm.align.config import EarlyStoppingSettings
from openpalm.align.logprobs import entropies, evaluate
from openpalm.align.rollouts.monitor import evaluate_policy, stop_reason
from openpalm.align.rollouts.sampler import Sampler
from openpalm.errors import SettingsError, WorkError


def sampler_of(model, **changes):
    return Sampler(model, PROMPTS, frozenset({END}), grpo(**changes))


def reference(inputs, targets):
    return evaluate(task().reference, inputs, targets).log_probs


def evaluated(model, prompts=(0,) * 400, gold=None, **changes):
    return evaluate_policy(sampler_of(model, **changes), prompts, reference, task().reward, gold)


def test_metrics_are_those_of_the_policy():
    """Means over 400 completions within four standard errors of sums over all 341."""
    row, completions = evaluated(
        moved(), gold=lambda completions: [float(a.ended) for a in completions]
    )
    rollout = enumerated(moved(), task().rewards[0])
    chances = rollout.old_log_probs.double().sum(dim=-1).exp()

    def near(found, each):
        mean = (chances * each).sum()
        error = ((chances * (each - mean) ** 2).sum() / 400).sqrt()
        assert abs(found - mean) < 4 * error

    lengths = rollout.mask.sum(dim=-1).double()
    ended = ((rollout.targets == END) & rollout.mask).any(dim=-1).double()
    near(row["val_reward"], rollout.rewards.double())
    near(row["val_kl"], (rollout.old_log_probs - rollout.reference_log_probs).double().sum(dim=-1))
    near(row["val_length"], lengths)
    near(row["val_ended"], ended)
    assert row["val_gold"] == row["val_ended"]
    assert row["val_distinct"] == len({tuple(a.ids) for a in completions}) / 400
    inside = torch.cat([_entropies(a) for a in completions])
    assert row["val_entropy"] == pytest.approx(inside.mean().item(), rel=1e-4)


@torch.no_grad()
def _entropies(completion):
    ids = torch.tensor([[*completion.prompt_ids, *completion.ids]])
    logits = moved().logits(ids[:, :-1])[0, len(completion.prompt_ids) - 1 :]
    return entropies(logits)


def test_evaluations_share_seeds_that_training_does_not_use():
    model = moved()
    sampler = sampler_of(model)
    sampler.drawn = 77
    first, completions = evaluate_policy(sampler, [0, 1, 2, 3], reference, task().reward, None)
    assert sampler.drawn == 77
    again, same_completions = evaluate_policy(sampler, [0, 1, 2, 3], reference, task().reward, None)
    assert first == again
    assert [a.ids for a in completions] == [a.ids for a in same_completions]
    sampler.drawn = 0
    many = 64
    trained_on = sampler.sample([0] * many, 1)
    _, seen = evaluate_policy(sampler, [0] * many, reference, task().reward, None)
    assert [a.ids for a in trained_on] != [a.ids for a in seen]


def test_at_the_reference_the_kl_is_zero():
    row, _ = evaluated(copy.deepcopy(task().reference), range(4))
    assert row["val_kl"] == pytest.approx(0, abs=1e-5)
    assert "val_gold" not in row


def test_a_gold_reward_that_is_not_finite_is_refused():
    with pytest.raises(WorkError, match="is nan"):
        evaluated(moved(), range(4), gold=lambda completions: [float("nan")] * 4)


def test_completions_are_of_the_task():
    _, completions = evaluated(moved(), range(4))
    assert [a.prompt for a in completions] == [0, 1, 2, 3]
    assert all(tuple(a.ids) in INDEX for a in completions)


# --- early stopping


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_limits_are_numbers(value):
    with pytest.raises(
        SettingsError, match=r"--early-stopping.max-kl .*: must be 0 or more, and finite"
    ):
        EarlyStoppingSettings(max_kl=value)


def row(**changes):
    return {
        "val_reward": 1.0,
        "val_gold": 1.0,
        "val_kl": 1.0,
        "val_length": 10.0,
        "val_entropy": 2.0,
    } | changes


GOLD = EarlyStoppingSettings(gold_drop=0.5)
CASES = {
    "nothing is looked at": (GOLD, [], None),
    "rows of steps alone": (GOLD, [{"loss": 1.0, "reward": 3.0}], None),
    "no bands": (EarlyStoppingSettings(), [row(), row(val_reward=9, val_gold=-9, val_kl=99)], None),
    "gamed": (GOLD, [row(), row(val_reward=2.0, val_gold=0.4)], "the reward is being gamed"),
    "gamed since the best": (
        GOLD,
        [row(val_gold=0.0), row(val_gold=1.2), row(val_reward=1.5, val_gold=0.6)],
        "rose from 1 to 1.5 while the gold reward fell from 1.2 to 0.6",
    ),
    "fallen by less": (GOLD, [row(), row(val_reward=2.0, val_gold=0.6)], None),
    "both fell": (GOLD, [row(), row(val_reward=0.5, val_gold=0.0)], None),
    "recovered": (
        GOLD,
        [row(), row(val_reward=2.0, val_gold=0.0), row(val_reward=3.0, val_gold=0.9)],
        None,
    ),
    "no gold": (
        GOLD,
        [{k: v for k, v in row(val_reward=r).items() if k != "val_gold"} for r in (1, 9)],
        None,
    ),
    "steps between": (
        GOLD,
        [row(), {"loss": 1.0}, row(val_reward=2.0, val_gold=0.0), {"loss": 1.0}],
        "gamed",
    ),
    "far": (
        EarlyStoppingSettings(max_kl=2.0),
        [row(val_kl=2.5)],
        r"2.5 nats .*--early-stopping.max-kl 2",
    ),
    "near": (EarlyStoppingSettings(max_kl=2.0), [row(val_kl=2.0)], None),
    "long": (
        EarlyStoppingSettings(max_length=9.0),
        [row()],
        r"10 tokens .*--early-stopping.max-length 9",
    ),
    "all alike": (
        EarlyStoppingSettings(min_entropy=2.5),
        [row()],
        r"2 nats .*--early-stopping.min-entropy 2.5",
    ),
    "not alike": (EarlyStoppingSettings(min_entropy=1.5), [row()], None),
}


@pytest.mark.parametrize("name", CASES)
def test_early_stopping(name):
    settings, rows, says = CASES[name]
    found = stop_reason(settings, rows)
    if says is None:
        assert found is None
    else:
        assert re.search(says, found)


def test_rows_at_a_time_change_no_metric():
    """Whatever the rows of a part, the same figures."""
    whole = evaluated(moved(), range(4))[0]
    sampler = sampler_of(moved())
    parts = partial(evaluate_policy, sampler, range(4), reference, task().reward, None)
    assert parts(rows=3)[0] == pytest.approx(whole, rel=1e-5)
