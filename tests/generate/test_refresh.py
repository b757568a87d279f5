"""The engine keeps the weights it was given: what happens to the model later does not reach it."""

import pytest
import torch
from tiny_models import KINDS, tiny

from openpalm.generate.engine import Engine
from openpalm.model import lora
from openpalm.model.config import LoraConfig
from openpalm.model.critic import ActorCritic
from openpalm.model.recompute import recompute

IDS = list(range(1, 24))


def adapted(model):
    lora.attach(model, LoraConfig(3, 12.0, tuple(model.config.matrices)), seed=0)
    return model


def recomputed(model):
    recompute(model, "full")
    return model


def compiled(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


MADE = {
    **{kind: lambda kind=kind: tiny(**KINDS[kind]) for kind in KINDS},
    "bfloat16": lambda: tiny(**KINDS["gpt-j"]).to(torch.bfloat16),
    "adapter": lambda: adapted(tiny()),
    "recomputed": lambda: recomputed(tiny()),
    "compiled": lambda: compiled(tiny()),
    "recomputed adapter": lambda: recomputed(adapted(tiny())),
}


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_no_parameter_reaches_the_engine_after_refresh(kind):
    model = MADE[kind]()
    engine = Engine(model)
    before = engine.score([IDS])[0]
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(3).add_(0.5)
        assert torch.equal(engine.score([IDS])[0], before), name
        parameter.copy_(kept)
    for parameter in model.parameters():
        parameter.mul_(1.5).add_(0.1)
    engine.refresh(model)
    assert not torch.allclose(engine.score([IDS])[0], before, atol=1e-3)


@torch.no_grad()
def test_an_engine_that_owns_its_model_copies_no_table():
    model = tiny()
    assert Engine(model, owned=True).model.embedding is model.embedding
    assert Engine(model).model.embedding is not model.embedding


@torch.no_grad()
def test_what_only_training_needs_is_not_copied():
    model = ActorCritic(tiny().config, "separate")
    for parameter in model.parameters():
        parameter.fill_(0.01)
    engine = Engine(model)
    assert isinstance(engine.model, ActorCritic)
    assert model.critic.trunk is not None
    assert engine.model.critic.trunk is not None
    assert engine.model.critic.trunk.embedding is model.critic.trunk.embedding
