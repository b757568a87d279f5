"""A critic in the same module as its policy: what it reads, where it starts, what is published."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from enumerable import CONFIG
from rollouts import actor, every_completion, moved

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.checkpoint import directory as checkpoint
from openpalm.model.critic import ActorCritic, Bins
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer

BINS = Bins(5, -1.0, 3.0)
KINDS = ("shared", "detached", "separate")


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def test_bins():
    assert BINS.centres().tolist() == [-1, 0, 1, 2, 3]
    logits = torch.tensor([[0.0] * 5, [-99.0, -99, -99, -99, 0], [0, 0, -99, -99, -99]])
    assert BINS.expected(logits).tolist() == pytest.approx([1, 3, -0.5])


@pytest.mark.parametrize("bins", [None, BINS])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_value_is_read_from_the_state_before_the_token(kind, bins):
    """From the final-norm states of the whole row, place by place."""
    model = actor(kind, bins).eval()
    inputs, targets = every_completion()
    found = evaluate(model, inputs, targets)
    trunk = model if model.critic.trunk is None else model.critic.trunk
    states = trunk.hidden(inputs)
    wanted = states @ model.critic.read.weight.T + model.critic.read.bias
    wanted = wanted[targets >= 0]
    assert torch.allclose(found.values, wanted if bins else wanted[:, 0], atol=1e-5)
    assert model.as_value(found.values).shape == (int((targets >= 0).sum()),)
    assert torch.equal(found.log_probs, token_log_probs(model, inputs, targets))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_critic_does_not_change_the_policy(kind):
    inputs, targets = every_completion()
    alone, both = moved(), actor(kind)
    assert torch.equal(
        token_log_probs(alone, inputs, targets), evaluate(both, inputs, targets).log_probs
    )


def check_start(model):
    model.reset_critic()
    found = evaluate(model, *every_completion())
    middle = 1.0 if model.critic.bins else 0.0
    assert torch.allclose(model.as_value(found.values), torch.tensor(middle))
    if model.critic.trunk is not None:
        own = dict(model.critic.trunk.named_parameters())
        assert own.keys() == dict(model.published_parameters()).keys()
        assert all(torch.equal(own[name], p) for name, p in model.published_parameters())


@pytest.mark.parametrize("bins", [None, BINS])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_critic_starts_at_zero_with_a_trunk_like_the_policys(kind, bins):
    check_start(actor(kind, bins))

    class Forgetful(ActorCritic):
        def reset_critic(self):
            self.critic.read.bias.zero_()

    model = Forgetful(CONFIG, kind, bins)
    initialise(model, 3)
    fails(check_start, model)


def check_optimizer_has_all(model, optimizer):
    steps = {p for part in optimizer.parts for g in part.param_groups for p in g["params"]}
    assert steps == set(model.parameters())
    assert sum(len(g["params"]) for part in optimizer.parts for g in part.param_groups) == len(
        steps
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_steps_the_critic(kind, name):
    model = actor(kind, BINS)
    check_optimizer_has_all(model, Optimizer(model, OptimSettings(name=name), 1e-3))
    published = dict(model.published_parameters()).values()
    without = SimpleNamespace(
        parameters=lambda: iter(published), named_parameters=model.published_parameters
    )
    fails(check_optimizer_has_all, model, Optimizer(without, OptimSettings(name=name), 1e-3))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_published_is_the_policy_alone(kind, tmp_path):
    model = actor(kind, BINS, dropout=0.0).eval()
    assert {n for n, _ in model.published_parameters()} == {
        n for n, _ in moved().named_parameters()
    }
    checkpoint.save(tmp_path / "step", model, fingerprint=True)
    found = checkpoint.load(tmp_path / "step")
    assert type(found) is Transformer
    inputs, targets = every_completion()
    assert torch.equal(
        token_log_probs(found, inputs, targets), token_log_probs(model, inputs, targets)
    )


def test_values_where_the_head_reads_raw_states():
    model = ActorCritic(replace(CONFIG, norm_before_head=False))
    initialise(model, 0)
    inputs, targets = every_completion()
    with torch.no_grad():
        found = evaluate(model, inputs, targets).values
        wanted = model.critic(model.hidden(inputs))[targets >= 0]
    assert torch.allclose(found, wanted, atol=1e-5)
