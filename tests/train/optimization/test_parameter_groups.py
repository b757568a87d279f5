"""Optimizers against equations written out here, and which parameters go where."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_samples import made, same, tiny, weights

from openpalm.model.config import RewardConfig
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.optimizers import AdamW, Muon
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimization.schedule import learning_rate_factor


class Few(nn.Module):
    """A matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.scale = nn.Parameter(torch.randn(3, generator=generator))

    def give_gradients(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_equals_its_equations_in_float64():
    """Loshchilov and Hutter 2019, algorithm 2, with the schedule multiplying the rate."""
    settings = OptimSettings(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6)
    lr = 0.02
    model = Few()
    optimizer = Optimizer(model, settings, lr)
    theta = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    m = {n: np.zeros_like(v) for n, v in theta.items()}
    v = {n: np.zeros_like(x) for n, x in theta.items()}
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 21):
        model.give_gradients(generator)
        factor = learning_rate_factor(t, 20, settings)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            g = parameter.grad.double().numpy()
            decay = settings.weight_decay if g.ndim == 2 else 0.0
            rate = lr * factor
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g**2
            m_hat, v_hat = m[name] / (1 - 0.8**t), v[name] / (1 - 0.9**t)
            step = m_hat / (np.sqrt(v_hat) + 1e-6) + decay * theta[name]
            theta[name] = theta[name] - rate * step
        optimizer.step(factor)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), theta[name], rtol=2e-5, atol=2e-6)


NAMES = ["adamw", "stable-adamw", "lion", "adafactor", "muon"]


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_vectors_never(name: str):
    model = made(tiny(bias=True, qk_norm=True, tied=False))
    settings = OptimSettings(name=name, weight_decay=0.5, decay_rule="fixed")  # type: ignore[arg-type]
    before = weights(model)
    optimizer = Optimizer(model, settings, lr=0.02)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # then only the decay moves anything
    optimizer.step(1.0)
    for key, value in weights(model).items():
        if value.dim() == 1:
            assert torch.equal(value, before[key]), key
        else:
            assert torch.allclose(value, before[key] * (1 - 0.02 * 0.5)), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_one_place(name: str):
    model = made(tiny(bias=True, qk_norm=True, tied=False))
    optimizer = Optimizer(model, OptimSettings(name=name), 1e-3)  # type: ignore[arg-type]
    placed = [p for part in optimizer.parts for g in part.param_groups for p in g["params"]]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(model.parameters())


def test_muon_gets_the_blocks_matrices_only():
    model = made(tiny(bias=True, qk_norm=True, tied=False))
    optimizer = Optimizer(model, OptimSettings(name="muon", muon_lr=0.07), 1e-3)
    adamw, muon = optimizer.parts
    assert isinstance(adamw, AdamW)
    assert isinstance(muon, Muon)
    assert [group["peak_lr"] for group in muon.param_groups] == [0.07]
    assert {group["peak_lr"] for group in adamw.param_groups} == {1e-3}
    names = dict(model.named_parameters())
    expected = {n for n, p in names.items() if n.startswith("blocks.") and p.dim() == 2}
    assert len(expected) == 2 * 6  # q, kv, gate, up, out, down
    muons = {optimizer.names[p] for group in muon.param_groups for p in group["params"]}
    assert muons == expected


def test_muon_leaves_reward_heads_alone():
    model = RewardModel(tiny(), RewardConfig(marks=True, members=2))
    optimizer = Optimizer(model, OptimSettings(name="muon"), 1e-3)
    placed = [{*part.param_groups[0]["params"]} for part in optimizer.parts]
    assert {model.reward_head, model.marks} <= placed[0]
    assert {model.blocks[0].project_in.q} <= placed[1]


def test_frozen_parameters_are_left_alone():
    model = made()
    model.embedding.requires_grad_(False)
    optimizer = Optimizer(model, OptimSettings(), 1e-2)
    before = model.embedding.detach().clone()
    model.logits(torch.arange(8)[None]).square().sum().backward()
    optimizer.clip()
    optimizer.step(1.0)
    assert torch.equal(model.embedding, before)


@pytest.mark.parametrize(("clip", "shrinks"), [(1.0, True), (100.0, False)])
def test_clip_is_the_global_norm(clip: float, shrinks: bool):
    model = Few()
    optimizer = Optimizer(model, OptimSettings(clip=clip), 1e-3)
    model.matrix.grad = torch.full((4, 3), 3.0)
    model.scale.grad = torch.tensor([4.0, 4.0, 4.0])
    norm = math.sqrt(12 * 9 + 3 * 16)
    assert math.isclose(optimizer.clip(), norm, rel_tol=1e-6)
    left = torch.cat([model.matrix.grad.flatten(), model.scale.grad])
    assert math.isclose(float(left.norm()), clip if shrinks else norm, rel_tol=1e-5)
    assert math.isclose(float(left[-1] / left[0]), 4 / 3, rel_tol=1e-6)  # the direction stays


def test_the_rate_rises_to_its_peak_then_falls_to_its_end():
    settings = OptimSettings(warmup=0.1, final_lr=0.2)
    factors = [learning_rate_factor(step, 200, settings) for step in range(1, 201)]
    assert factors[:20] == pytest.approx([step / 20 for step in range(1, 21)])
    assert factors[19] == 1.0
    assert factors[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(factors[19:]))


def test_the_cosine_is_torchs_own():
    settings = OptimSettings(warmup=0.0, final_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    for step in range(1, 51):
        optimizer.step()
        schedule.step()
        expected = schedule.get_last_lr()[0]
        assert learning_rate_factor(step, 50, settings) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_have_a_rate_at_every_step(warmup: float, steps: int):
    settings = OptimSettings(warmup=warmup)
    factors = [learning_rate_factor(step, steps, settings) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize("name", NAMES)
def test_restored_state_continues_exactly(name: str):
    settings = OptimSettings(name=name)  # type: ignore[arg-type]
    model = made()

    def gradients(of: Transformer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in of.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    optimizer = Optimizer(model, settings, 1e-2)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step(0.5)
    copied = copy.deepcopy(model)
    state = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    slots = {"exp_avg", "step"} if name == "lion" else {"exp_avg", "exp_avg_sq", "step"}
    assert {key.rsplit("/", 1)[1] for key in state} >= slots

    other = Optimizer(copied, settings, 1e-2)
    other.load_state_tensors(state)
    assert same(other.state_tensors(), optimizer.state_tensors())
    forgetful_model = copy.deepcopy(model)
    forgetful = Optimizer(forgetful_model, settings, 1e-2)
    pairs: list[tuple[Transformer, Optimizer]]
    pairs = [(model, optimizer), (copied, other), (forgetful_model, forgetful)]
    stepped: list[dict[str, Tensor]] = []
    for of, by in pairs:
        gradients(of, 9)
        by.step(0.3)
        stepped.append(weights(of))
    assert same(stepped[0], stepped[1])
    assert not same(stepped[0], stepped[2])


def factors_of(settings: OptimSettings, steps: int) -> list[float]:
    return [learning_rate_factor(step, steps, settings) for step in range(1, steps + 1)]


def test_linear_falls_in_a_line():
    factors = factors_of(OptimSettings(schedule="linear", warmup=0.2, final_lr=0.1), 50)
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[29] == pytest.approx(0.55)  # half of the way from 1 to 0.1
    assert factors[49] == pytest.approx(0.1)
    falls = [a - b for a, b in itertools.pairwise(factors[9:])]
    assert falls == pytest.approx([0.9 / 40] * 40)


def test_wsd_waits_for_its_cooldown():
    settings = OptimSettings(schedule="wsd", warmup=0.1, cooldown=0.25, final_lr=0.0)
    factors = factors_of(settings, 40)
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[4:30] == [1.0] * 26
    assert factors[30:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    never = OptimSettings(schedule="wsd", warmup=0.0, cooldown=0.0)
    assert factors_of(never, 7) == [1.0] * 7


def test_palm_is_the_papers_rate_over_its_own_steps():
    """1e-2 for 10,000 steps, then 1/sqrt(k), of 255,000 (section 5)."""
    settings = OptimSettings(name="adafactor", schedule="palm", lr=1e-2)
    for step in (1, 9_999, 10_000, 10_001, 40_000, 255_000):
        rate = 1e-2 * learning_rate_factor(step, 255_000, settings)
        assert rate == pytest.approx(min(1e-2, step**-0.5), rel=1e-12)


def test_palm_keeps_its_shape_in_short_runs():
    settings = OptimSettings(schedule="palm")
    long, short = factors_of(settings, 2550), factors_of(settings, 255)
    assert short == pytest.approx([long[10 * step - 1] for step in range(1, 256)])
    warmed = factors_of(OptimSettings(schedule="palm", warmup=0.1), 100)
    assert warmed[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert warmed[39] == pytest.approx(0.5)  # sqrt(10 / 40)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "palm"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_schedule_has_a_rate_in_short_runs(schedule: str, steps: int):
    settings = OptimSettings(schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < factor <= 1 for factor in factors_of(settings, steps))


@pytest.mark.parametrize(("rule", "shrinks"), [("fixed", 0.2 * 0.3), ("palm", 0.3 * 0.04)])
def test_what_a_step_shrinks_by(rule: str, shrinks: float):
    """Weights of zero gradient: by lr x 0.3, and by lr^2 x 0.3."""
    model = Few()
    settings = OptimSettings(weight_decay=0.3, decay_rule=rule)  # type: ignore[arg-type]
    optimizer = Optimizer(model, settings, 0.4)
    before = model.matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5)
    assert torch.allclose(model.matrix, before * (1 - shrinks))


def test_defaults_are_each_optimizers_own():
    lion, adafactor = (OptimSettings(name=name).resolved() for name in ("lion", "adafactor"))
    assert (lion.beta1, lion.beta2, lion.eps, lion.weight_decay) == (0.9, 0.99, None, 0.3)
    assert lion.peak(3e-3, 512) == pytest.approx(1e-3)
    assert (adafactor.beta2, adafactor.decay_rule, adafactor.weight_decay) == (None, "palm", 1.0)
    assert adafactor.peak(1e-4, 18432) == pytest.approx(1e-2, rel=0.4)  # PaLM 540B
    assert OptimSettings(name="lion", lr=0.1).peak(1e-3, 512) == 0.1
    assert OptimSettings().peak(1e-3, 512) == 1e-3
    assert OptimSettings(schedule="palm").resolved().warmup == 0.0
    assert OptimSettings(weight_decay=0.0, decay_rule="palm").resolved().weight_decay == 0.0
    assert lion.resolved() == lion


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "palm"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"cooldown": 1.0, "warmup": 0.0}, {"warmup": 0.5}])
def test_the_shortest_runs_learn(schedule, steps, changes):
    changes = changes if schedule == "wsd" else {k: changes[k] for k in changes if k == "warmup"}
    settings = OptimSettings(schedule=schedule, final_lr=0.0, **changes)
    factors = [learning_rate_factor(step, steps, settings) for step in range(1, steps + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0
    assert steps > 1 or factors == [1.0]
