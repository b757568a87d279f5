"""The order of layouts, and the remedies of those that do not fit."""

import itertools
from dataclasses import replace

import pytest

from openpalm.errors import SettingsError
from openpalm.model.config import preset
from openpalm.plan.devices import DEVICES, GIB
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import step_memory
from openpalm.plan.ranking import Goal, default_batch_tokens, ranked, reason
from openpalm.plan.training import Training, cut_batch


def goal(gpus: int, gpu: str = "h100", name: str = "palm-8b", context: int = 2048) -> Goal:
    batch = default_batch_tokens(context, gpus)
    training = Training(preset(name).config, context, 1)
    return Goal(training, gpus, DEVICES[gpu], 1e11, batch, 8192, cost_per_gpu_hour=2.0)


def test_those_that_fit_come_first_and_fastest():
    plans = ranked(goal(8, "a100-40gb"), {}, None)
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True)
    assert 0 < sum(fits) < len(fits)
    speeds = [plan.tokens_per_s for plan in plans if plan.fits]
    assert all(b <= a * 1.005 for a, b in itertools.pairwise(speeds))


def test_the_least_recomputation_that_fits():
    for plan in ranked(goal(8, "a100-40gb"), {}, None):
        if plan.training.recompute == "full" and plan.fits:
            less = replace(plan.training, recompute="selective")
            assert step_memory(less, plan.layout, cuda=True).total > plan.goal.device.usable


def test_time_days_and_cost_agree():
    plan = ranked(goal(64), {}, "none")[0]
    assert plan.days * 86400 == pytest.approx(1e11 / plan.goal.batch_tokens * plan.time.total)
    assert plan.cost == pytest.approx(plan.days * 24 * 64 * 2)
    found = plan.as_json()
    assert sum(found["memory_bytes"].values()) == pytest.approx(2 * plan.memory.total)
    assert sum(found["step_s"].values()) == pytest.approx(2 * plan.time.total)


def test_reasons_name_what_fits():
    plans = ranked(goal(8, "a100-40gb"), {}, "none")
    unfit = next(plan for plan in plans if plan.layout == Layout(shard=8))
    said = reason(unfit, plans)
    assert said.startswith(f"needs {unfit.memory.total / GIB:.1f} of 37.6 GiB, most for ")
    assert "--recompute full fits" in said or "--recompute selective fits" in said


def test_too_few_gpus_says_how_many():
    plans = ranked(goal(4, "a100", "palm-62b"), {}, None)
    assert not any(plan.fits for plan in plans)
    said = reason(next(plan for plan in plans if plan.layout == Layout(shard=4)), plans)
    shards = int(said.split("; shard ")[1].split()[0])
    assert f"shard {shards} fits, on {shards} GPUs" in said
    (enough, *_) = ranked(goal(shards, "a100", "palm-62b"), {"shard": shards}, "full")
    assert enough.fits


def test_batch_is_cut_as_a_run_cuts_it():
    training = Training(preset("palm-8b").config, 2048, 1)
    layout = Layout(replicate=2, shard=4, tensor=2)
    cut = cut_batch(training, layout, batch_tokens=2048 * 8 * 6, microbatch_tokens=8192)
    assert (cut.rows, cut.accumulation) == (3, 2)
    with pytest.raises(SettingsError, match=r"replicate x shard \(2048 x 8\); use 16384 or 32768"):
        cut_batch(training, layout, batch_tokens=2048 * 12, microbatch_tokens=8192)


@pytest.mark.parametrize(("gpus", "sequences"), [(1, 16), (64, 16), (1024, 2), (6144, 1)])
def test_default_batch(gpus: int, sequences: int):
    assert default_batch_tokens(2048, gpus) == 2048 * gpus * sequences
