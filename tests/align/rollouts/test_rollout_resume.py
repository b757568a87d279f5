"""Resuming rollouts: in the middle of one, after a failed reward, and from a temporary file."""

import json

import pytest
import torch
from rollouts import KINDS, grpo, loader_of, moved, same, task, trainer_of

from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import sampler as sampler_file
from openpalm.errors import WorkError
from openpalm.generate.sampling import Sampling
from openpalm.parallel.config import Axes
from openpalm.parallel.world import World


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def by_way_of_json(loader):
    state = json.loads(json.dumps(loader.state_dict()))
    return state, {name: t.clone() for name, t in loader.state_tensors().items()}


def check_resumes(kind, left_out=None, **changes):
    """After every number of batches: saved, restored into a fresh loader, the same from there."""
    how, _, estimate, make = KINDS[kind]
    settings = how(epochs_per_rollout=2, minibatches=2, target_kl=0.5, kl_horizon=20, **changes)
    rows = settings.prompts_per_rollout * settings.num_completions // 4
    original = loader_of(make(), settings, estimate, rows=rows)
    saved, given = [], []
    for _ in range(20):
        saved.append(by_way_of_json(original))
        given.append((next(original), dict(original.facts)))
    for begin in range(0, 13, 3):
        again = loader_of(make(), settings, estimate, rows=rows)
        state, tensors = saved[begin]
        if left_out:
            state |= {left_out: again.state_dict()[left_out]}
        again.load_state_dict(state)
        again.load_state_tensors(tensors)
        for batch, facts in given[begin:]:
            assert same(next(again), batch)
            assert again.facts == facts


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_in_the_middle_of_a_rollout(kind):
    check_resumes(kind)
    for name in ("order", "rollouts", "rows_left", "drawn", "beta"):
        with pytest.raises((AssertionError, RuntimeError)):
            check_resumes(kind, left_out=name)


@pytest.mark.parametrize("kind", KINDS)
def test_other_processes_and_microbatches_take_the_rows_that_are_left(kind):
    """Six rows are no whole number of prompts, three are less than one prompt has."""
    how, _, estimate, make = KINDS[kind]
    settings = how(prompts_per_rollout=6, num_completions=4, minibatches=2, epochs_per_rollout=2)
    first = loader_of(make(), settings, estimate, rows=12)
    next(first)
    state, tensors = by_way_of_json(first)
    left = [tokens_of([next(first)]) for _ in range(3)]
    for processes, rows in ((2, 6), (2, 3), (4, 3)):
        found = [[] for _ in left]
        for rank in range(processes):
            world = World(rank, processes, Axes(shard=processes))
            again = loader_of(make(), settings, estimate, rows=rows, world=world)
            again.load_state_dict(state)
            again.load_state_tensors(tensors)
            for step in found:
                step += [next(again) for _ in range(12 // processes // rows)]
        assert [tokens_of(step) for step in found] == left


def tokens_of(batches):
    """What identifies each token that the batches learn from, in one order."""
    columns = ("old_log_probs", "reference_log_probs", "advantages")
    return sorted(
        row
        for batch in batches
        for row in zip(*(getattr(batch, c)[batch.mask].tolist() for c in columns), strict=True)
    )


def check_trainer_resumes(kind, forget=lambda tensors: None):
    """Weights, a critic that no checkpoint publishes, optimizer and rollout: bit for bit."""
    how, objective, estimate, make = KINDS[kind]
    settings = how(epochs_per_rollout=2, minibatches=2)

    def trainer(model):
        loader = loader_of(model, settings, estimate, rows=settings.prompts_per_rollout)
        return trainer_of(loader, objective(settings))

    original = trainer(make())
    for _ in range(3):
        original.train_step()
    tensors, values = original.state()
    tensors = {name: t.clone() for name, t in tensors.items()}
    published = {name: p.detach().clone() for name, p in original.model.published_parameters()}
    wanted = [original.train_step() for _ in range(4)]
    again = trainer(make())
    again.model.load_state_dict(published, strict=False)
    forget(tensors)
    again.restore(tensors, json.loads(json.dumps(values)))
    assert [again.train_step() for _ in range(4)] == wanted
    ends = [dict(t.model.named_parameters()) for t in (original, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_resumes_in_the_middle_of_a_rollout(kind):
    check_trainer_resumes(kind)

    def the_critic(tensors):
        tensors |= {n: t + 0.1 for n, t in tensors.items() if n.startswith("model/critic.")}

    def its_moments(tensors):
        for name in [n for n in tensors if n.startswith("optimizer/critic.")]:
            del tensors[name]

    def the_rollout(tensors):
        tensors["loader/advantages"] = -tensors["loader/advantages"]

    for bug in (the_critic, its_moments, the_rollout):
        if kind == "ppo" or bug is the_rollout:
            fails(check_trainer_resumes, kind, bug)


def test_it_resumes_with_resampling():
    check_resumes("grpo", advantage="dapo")


def test_a_finished_rollout_is_not_saved():
    loader = loader_of(moved(), grpo(epochs_per_rollout=1), group_file.estimate)
    assert loader.state_tensors() == {}
    for _ in range(4):
        next(loader)
    assert loader.state_tensors() == {}
    next(loader)
    names = "inputs targets old reference correction values advantages returns"
    assert loader.state_tensors().keys() == {*names.split()}  # as every version stores them


def seeds(monkeypatch, run):
    """Of every completion that `run` has drawn."""
    found = []

    def noted(temperature, seed):
        found.append(seed)
        return Sampling(temperature, seed=seed)

    monkeypatch.setattr(sampler_file, "Sampling", noted)
    run()
    return found


def test_no_seed_is_used_twice(monkeypatch):
    settings = grpo(advantage="dapo", max_resamples=2)

    def half_equal(completions):
        return [float(a.prompt > 1) * len(a.ids) for a in completions]

    def run():
        loader = loader_of(moved(), settings, group_file.estimate, half_equal)
        for _ in range(16):
            next(loader)
        again = loader_of(moved(), settings, group_file.estimate, half_equal)
        again.load_state_dict(by_way_of_json(loader)[0])
        for _ in range(8):
            next(again)

    found = seeds(monkeypatch, run)
    assert len(found) > 6 * 16, "completions were replaced"
    assert len(set(found)) == len(found)
    assert not set(found) & set(seeds(monkeypatch, lambda: next(_of_seed(1))))


def _of_seed(seed):
    return loader_of(moved(), grpo(seed=seed), group_file.estimate)


def test_a_failed_rollout_is_sampled_again():
    """As if nothing had been drawn: the same completions to the same prompts."""
    broken = [True]

    def reward(completions):
        if broken:
            raise WorkError("no")
        return task().reward(completions)

    undisturbed = loader_of(moved(), grpo(), group_file.estimate)
    loader = loader_of(moved(), grpo(), group_file.estimate, reward)
    for _ in range(2):
        with pytest.raises(WorkError):
            next(loader)
    before = by_way_of_json(loader)
    assert before == by_way_of_json(loader_of(moved(), grpo(), group_file.estimate))
    broken.clear()
    assert same(next(loader), next(undisturbed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_on_disk_is_the_same(kind, tmp_path):
    how, objective, estimate, make = KINDS[kind]
    losses = []
    for limit in (1 << 28, 0):
        settings = how(
            epochs_per_rollout=2, minibatches=2, rollout_memory_bytes=limit, out=tmp_path
        )
        loader = loader_of(make(), settings, estimate)
        trainer = trainer_of(loader, objective(settings))
        losses.append([trainer.train_step().loss for _ in range(10)])
        state, tensors = by_way_of_json(loader)
    assert losses[0] == losses[1]
    again = loader_of(loader.sampler.model, settings, estimate)
    again.load_state_dict(state)
    again.load_state_tensors(tensors)
    assert same(next(again), next(loader))
    assert list(tmp_path.iterdir()) == []
