"""Adapters: their equation, nothing changed by attaching, and only they learn.

Every check is a function of the thing checked, and is shown to fail when its bug is put in.
"""

import hashlib
from contextlib import contextmanager

import numpy_reference
import pytest
import torch
from small_models import BASE, SHAPES, ids_for, make
from tiny_models import tiny

from openpalm.align.logprobs import token_log_probs
from openpalm.errors import SettingsError
from openpalm.generate.quantize import quantize
from openpalm.model import lora
from openpalm.model.block import ProjectIn, ProjectOut
from openpalm.model.config import LoraConfig, lora_from_json
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer


def everywhere(config, rank=3, alpha=6.0):
    return LoraConfig(rank, alpha, tuple(config.matrices))


def moved(model):
    """As if trained: every factor away from where it began."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for factor in lora.adapter_parameters(model).values():
            factor += 0.3 * torch.randn(factor.shape, generator=generator)
    return model


def adapted(config, adapter=None):
    model = make(config).double()
    lora.attach(model, adapter or everywhere(config), seed=0)
    return moved(model)


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def names_and_shapes(model):
    return {name: p.shape for name, p in model.named_parameters()}


# --- the function it computes


def check_equation(config, model):
    """Against numpy on W + (alpha / rank) B A, put together outside of the model."""
    values = {name: p.detach().numpy() for name, p in model.named_parameters()}
    weights = {name: value.copy() for name, value in values.items() if ".lora." not in name}
    for name, a in values.items():
        if not name.endswith(".a"):
            continue
        place, target = name.removesuffix(".a").split(".lora.")
        delta = 2.0 * values[name.removesuffix("a") + "b"] @ a
        if target in ("k", "v"):
            half = len(delta)
            first = 0 if target == "k" else half
            weights[f"{place}.kv"][first : first + half] += delta
        else:
            weights[f"{place}.{target}"] += delta
    ids = ids_for(config)
    expected = torch.from_numpy(numpy_reference.logits(config, weights, ids.numpy()))
    assert (model.logits(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_its_equation(name):
    config = SHAPES[name]
    model = adapted(config)
    check_equation(config, model)
    wrong_scale = adapted(config, everywhere(config, alpha=3.0))
    fails(check_equation, config, wrong_scale)


def check_merged(model, merge):
    ids = ids_for(model.config)
    before = model.hidden(ids)
    assert (merge(model).hidden(ids) - before).abs().max() < 1e-10


@pytest.mark.parametrize("name", SHAPES)
def test_merged_is_unmerged(name):
    model = adapted(SHAPES[name])
    before = hash_of(model)
    check_merged(model, lora.merged)
    assert hash_of(model) == before  # the live model stays as it is
    assert names_and_shapes(lora.merged(model)) == names_and_shapes(make(SHAPES[name]))

    def in_place(model):
        lora.merge(model)
        return model

    check_merged(model, in_place)
    assert names_and_shapes(model) == names_and_shapes(make(SHAPES[name]))
    assert not lora.is_attached(model)
    assert all(p.requires_grad for p in model.parameters())
    assert {type(block.project_in) for block in model.blocks} == {ProjectIn}
    assert {type(block.project_out) for block in model.blocks} == {ProjectOut}


def test_a_merge_that_forgets_one_matrix_is_noticed():
    def forgetful(model):
        twin = lora.merged(model)
        twin.blocks[1].project_out.down = model.blocks[1].project_out.down
        return twin

    fails(check_merged, adapted(BASE), forgetful)


@pytest.mark.parametrize("target", BASE.matrices)
def test_one_target_alone(target):
    model = adapted(BASE, LoraConfig(2, 4.0, (target,)))
    side = "project_in" if target in lora.INPUTS else "project_out"
    found = {f"blocks.{i}.{side}.lora.{target}.{f}" for i in range(BASE.depth) for f in "ab"}
    assert set(lora.adapter_parameters(model)) == found
    rows, columns = BASE.matrices[target]
    factors = model.blocks[0].get_submodule(f"{side}.lora.{target}")
    assert (factors.a.shape, factors.b.shape) == ((2, columns), (rows, 2))
    check_equation(BASE, model)
    check_merged(model, lora.merged)


# --- attached, detached


def check_attaching_changes_nothing(model, attach):
    ids = ids_for(model.config)
    before, names = model.logits(ids), set(names_and_shapes(model))
    held = dict(model.named_parameters())
    attach(model, everywhere(model.config))
    assert torch.equal(model.logits(ids), before)
    now = dict(model.named_parameters())
    assert set(now) - set(lora.adapter_parameters(model)) == names
    assert all(now[name] is parameter for name, parameter in held.items())


@pytest.mark.parametrize("name", SHAPES)
def test_attaching_changes_nothing(name):
    check_attaching_changes_nothing(make(SHAPES[name]), lambda m, c: lora.attach(m, c, seed=0))

    def both_drawn(model, config):
        lora.attach(model, config, seed=0)
        moved(model)

    fails(check_attaching_changes_nothing, make(SHAPES[name]), both_drawn)


def test_factors_begin_as_the_reference_draws_them():
    config = SHAPES["grouped"]
    models = [make(config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        lora.attach(model, everywhere(config, rank=8), seed=seed)
    first, same, other = (lora.adapter_parameters(model.requires_grad_(False)) for model in models)
    for name, factor in first.items():
        assert torch.equal(factor, same[name])
        if name.endswith(".b"):
            assert not factor.any()
            continue
        assert not torch.equal(factor, other[name])
        reference = torch.nn.init.kaiming_uniform_(torch.empty(4000, factor.shape[1]), a=5**0.5)
        assert 0.9 * reference.abs().max() < factor.abs().max() <= reference.abs().max() * 1.001
        assert factor.std().item() == pytest.approx(reference.std().item(), rel=0.15)


def check_detached(model, base_log_probs, detached):
    """The reference of a run with an adapter: the base's log-probabilities, bit for bit."""
    ids = ids_for(model.config)
    with detached(model):
        assert torch.equal(token_log_probs(model, ids[:, :-1], ids[:, 1:]), base_log_probs)
        inside = lora.merged(model).logits(ids)  # what an engine would pack
        assert torch.equal(inside, model.logits(ids))


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.causal])
def test_detached_is_the_base_bit_for_bit(name):
    model = make(SHAPES[name])
    ids = ids_for(model.config)
    before = token_log_probs(model, ids[:, :-1], ids[:, 1:])
    lora.attach(model, everywhere(model.config), seed=0)
    moved(model)
    outside = model.logits(ids)
    check_detached(model, before, lora.detached)
    assert torch.equal(model.logits(ids), outside)

    @contextmanager
    def half_detached(model):
        with lora.detached(model):
            model.blocks[0].project_out.active = True
            yield

    fails(check_detached, model, before, half_detached)


def test_detached_is_attached_again_after_an_error_and_nests():
    model = adapted(BASE)
    outside = model.hidden(ids_for(BASE))
    with pytest.raises(KeyError), lora.detached(model), lora.detached(model):
        raise KeyError
    assert torch.equal(model.hidden(ids_for(BASE)), outside)


def test_an_adapter_wraps_a_projection_of_any_kind():
    """Its update is added to what the projection found there returns; here one fused matrix."""
    expected, model = adapted(BASE).float(), make(BASE)
    model.blocks = quantize(model, "float32").blocks
    lora.attach(model, everywhere(BASE))
    for block, original in zip(model.blocks, expected.blocks, strict=True):
        for side in ("project_in", "project_out"):
            getattr(block, side).lora = getattr(original, side).lora
    ids = ids_for(BASE)
    assert (model.logits(ids) - expected.logits(ids)).abs().max() < 1e-4


# --- who learns


def hash_of(model):
    """Of everything but the factors."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def check_optimizer(model, optimizer):
    """It steps every factor and nothing else."""
    held = {optimizer.names[p] for part in optimizer.parts for g in part.param_groups
            for p in g["params"]}  # fmt: skip
    expected = {name for name in dict(model.named_parameters()) if ".lora." in name}
    assert len(expected) == model.config.depth * 2 * len(model.config.matrices)
    assert held == expected


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_has_all_factors_and_nothing_else(name):
    settings = OptimSettings(name=name)
    model = tiny()
    lora.attach(model, everywhere(model.config), seed=0)
    check_optimizer(model, Optimizer(model, settings, 0.01))

    factor = model.blocks[1].project_in.lora["v"].b
    factor.requires_grad_(False)
    fails(check_optimizer, model, Optimizer(model, settings, 0.01))
    factor.requires_grad_(True)
    model.norm.weight.requires_grad_(True)
    fails(check_optimizer, model, Optimizer(model, settings, 0.01))


def check_only_factors_move(model, settings):
    before = hash_of(model)
    factors = {name: f.detach().clone() for name, f in lora.adapter_parameters(model).items()}
    optimizer = Optimizer(model, settings, 0.01)
    ids = ids_for(model.config)
    for _ in range(3):
        (-token_log_probs(model, ids[:, :-1], ids[:, 1:]).sum()).backward()
        optimizer.step(1.0)
    now = lora.adapter_parameters(model)
    assert not any(torch.equal(now[name], factor) for name, factor in factors.items())
    assert hash_of(model) == before


def test_the_base_is_the_same_after_training():
    model = tiny()
    lora.attach(model, everywhere(model.config), seed=0)
    check_only_factors_move(model, OptimSettings())
    model.embedding.requires_grad_(True)
    fails(check_only_factors_move, model, OptimSettings())


def test_heads_of_a_subclass_are_not_frozen():
    model = tiny()
    model.register_parameter("value_head", torch.nn.Parameter(torch.ones(3)))
    lora.attach(model, everywhere(model.config), seed=0)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {"value_head", *lora.adapter_parameters(model)}


# --- what cannot be


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "says"),
    [
        (0, 1.0, ("q",), "rank"),
        (1, 0.0, ("q",), "alpha"),
        (1, float("nan"), ("q",), "alpha"),
        (1, 1.0, ("q", "w"), "target w"),
        (1, 1.0, ("q", "q"), "each once"),
        (1, 1.0, (), "at least one"),
        (9, 1.0, ("q", "k"), "must be at most 8: k is 8 x 24"),
    ],
)
def test_values_that_make_no_adapter(rank, alpha, targets, says):
    with pytest.raises(SettingsError, match=says):
        LoraConfig(rank, alpha, targets).check(BASE)


def test_gate_is_there_with_swiglu_only():
    with pytest.raises(SettingsError, match="a gelu model has none"):
        LoraConfig(1, 1.0, ("gate",)).check(SHAPES["gpt-j"])


@pytest.mark.parametrize("name", ["grouped", "gpt-j"])
def test_parameters_are_counted(name):
    config = SHAPES[name]
    model = make(config)
    lora.attach(model, everywhere(config))
    counted = sum(p.numel() for p in lora.adapter_parameters(model).values())
    assert everywhere(config).parameters(config) == counted


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"rank": 1, "alpha": 1.0},
        {"rank": True, "alpha": 1.0, "targets": ["q"]},
        {"rank": 1, "alpha": "1", "targets": ["q"]},
        {"rank": 1, "alpha": 1.0, "targets": "q"},
        {"rank": 1, "alpha": 1.0, "targets": [["q"]]},
        {"rank": 1, "alpha": 1.0, "targets": ["q"], "more": 1},
    ],
)
def test_json_that_is_no_adapter(values):
    with pytest.raises(SettingsError, match="rank, alpha and targets"):
        lora_from_json(values, "config.json")
