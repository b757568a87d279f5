"""Every optimizer against its paper's equations, written out here in float64 for one tensor.

100 steps of a real small model, both sides with the gradients that ours has met on its way.
Libraries of others must agree too, where installed.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from train_samples import Repeating, made, ragged, tiny, trainer_of, weights

from openpalm.base.device import multiplies_bfloat16
from openpalm.model.transformer import Transformer
from openpalm.train.objective import NextToken
from openpalm.train.optimization import optimizers, parameter_groups
from openpalm.train.optimization.listwise import Chunk, Listwise
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimization.schedule import learning_rate_factor
from openpalm.train.optimizer_settings import OptimizerName, OptimSettings

STEPS = 100
RATES: dict[OptimizerName, float] = {
    "adamw": 1e-2,
    "stable-adamw": 1e-2,
    "lion": 1e-3,
    "adafactor": 3e-2,
    "muon": 1e-2,
}
CLOSE = 1e-12
"""Largest relative difference of any tensor over 100 steps in float64."""

MUON_DTYPE = [torch.bfloat16 if multiplies_bfloat16() else torch.float32]
"""What Muon iterates in on this processor; a test may put another one last."""

Equation = Callable[[Tensor, Tensor, dict[str, Tensor], int, float, float, OptimSettings], Tensor]
"""(theta, gradient, its moments, step from 1, rate, decay coefficient, settings) -> new theta"""


def adamw(w, g, state, t, lr, decay, s):
    """Loshchilov and Hutter 2019, algorithm 2."""
    state["m"] = s.beta1 * state.get("m", 0) + (1 - s.beta1) * g
    state["v"] = s.beta2 * state.get("v", 0) + (1 - s.beta2) * g**2
    m, v = state["m"] / (1 - s.beta1**t), state["v"] / (1 - s.beta2**t)
    return w - lr * (m / (v.sqrt() + s.eps) + decay * w)


def stable_adamw(w, g, state, t, lr, decay, s):
    """Wortsman et al. 2023, algorithm 2."""
    beta1 = s.beta1 * (1 - s.beta1 ** (t - 1)) / (1 - s.beta1**t)
    beta2 = s.beta2 * (1 - s.beta2 ** (t - 1)) / (1 - s.beta2**t)
    state["v"] = beta1 * state.get("v", 0) + (1 - beta1) * g
    state["u"] = beta2 * state.get("u", 0) + (1 - beta2) * g**2
    ratio = g**2 / torch.clamp(state["u"], min=s.eps**2)
    rate = lr / max(1.0, math.sqrt(ratio.mean()))
    return w - rate * decay * w - rate * state["v"] / (state["u"].sqrt() + s.eps)


def lion(w, g, state, t, lr, decay, s):
    """Chen et al. 2023, algorithm 2."""
    m = state.get("m", torch.zeros_like(g))
    update = torch.sign(s.beta1 * m + (1 - s.beta1) * g)
    state["m"] = s.beta2 * m + (1 - s.beta2) * g
    return w - lr * (update + decay * w)


def adafactor(w, g, state, t, lr, decay, s):
    """Chowdhery et al. 2022, section 5, with T5X's order: scaled, then averaged."""
    beta2 = 1 - t**-0.8
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * (g**2 + 1e-30)
    scale = max(1e-3, math.sqrt((w**2).mean()))
    state["m"] = s.beta1 * state.get("m", 0) + (1 - s.beta1) * lr * scale * g / state["v"].sqrt()
    return w - lr * decay * w - state["m"]


def muon(w, g, state, t, lr, decay, s):
    """Jordan et al. 2024: Nesterov momentum, orthogonalised by five quintic steps."""
    state["m"] = 0.95 * state.get("m", 0) + 0.05 * g
    x = (0.05 * g + 0.95 * state["m"]).to(MUON_DTYPE[-1])
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = (x.T if tall else x).to(w)
    return w - lr * decay * w - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * x


EQUATIONS: dict[OptimizerName, Equation] = {
    "adamw": adamw,
    "stable-adamw": stable_adamw,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
}


class Plain:
    """The equations applied to a model one tensor at a time, with clipping and schedule."""

    def __init__(self, model: Transformer, settings: OptimSettings, lr: float):
        self.model, self.settings, self.lr = model, settings, lr
        self.states: dict[str, dict[str, Tensor]] = {n: {} for n, _ in model.named_parameters()}

    @torch.no_grad()
    def step(self, t: int) -> None:
        s = self.settings
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        shrink = min(1.0, s.clip / (norm + 1e-6))  # torch's guard
        for name, parameter in self.model.named_parameters():
            takes_muon = s.name == "muon" and name.startswith("blocks.") and parameter.dim() == 2
            kind = "adamw" if s.name == "muon" and not takes_muon else s.name
            rate = (s.muon_lr if takes_muon else self.lr) * learning_rate_factor(t, STEPS, s)
            power = {"fixed": 0, "palm": 1, "nanopalm": 2}[s.decay_rule or "fixed"]
            decay = (s.weight_decay or 0.0) * rate**power if parameter.dim() == 2 else 0.0
            gradient = gradients[name] * shrink
            state = self.states[name]
            parameter.copy_(EQUATIONS[kind](parameter, gradient, state, t, rate, decay, s))
            parameter.grad = None


def model_in_float64() -> Transformer:
    return made(tiny(bias=True, qk_norm=True, tied=False)).double()


def give_gradients(model: Transformer, other: Transformer, t: int) -> None:
    """Those of the model to both, from batch `t`."""
    NextToken().loss(model, ragged(rows=2, seed=t))[0].backward()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        its.grad = mine.grad.clone()


def distance(a: Transformer, b: Transformer) -> float:
    """The largest relative difference of any tensor, in norm."""
    pairs = zip(weights(a).values(), weights(b).values(), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs if y.norm() > 0)


def differences(settings: OptimSettings) -> Iterator[float]:
    """Ours and the equations on the same gradients; how far apart they are after each step."""
    settings, lr = settings.resolved(), RATES[settings.name]
    ours = model_in_float64()
    theirs = copy.deepcopy(ours)
    optimizer, plain = Optimizer(ours, settings, lr), Plain(theirs, settings, lr)
    for t in range(1, STEPS + 1):
        give_gradients(ours, theirs, t)
        optimizer.clip()
        optimizer.step(learning_rate_factor(t, STEPS, settings))
        plain.step(t)
        yield distance(ours, theirs)


def check_follows_its_equations(settings: OptimSettings) -> None:
    for step, apart in enumerate(differences(settings), 1):
        assert apart < CLOSE, (step, apart)


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_hundred_steps_are_those_of_the_paper(name: OptimizerName):
    check_follows_its_equations(OptimSettings(name=name))


@pytest.mark.parametrize("native", [True, False])
def test_muon_iterates_in_what_the_processor_multiplies(
    native: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parameter_groups, "multiplies_bfloat16", lambda device: native)
    MUON_DTYPE.append(torch.bfloat16 if native else torch.float32)
    try:
        check_follows_its_equations(OptimSettings(name="muon"))
    finally:
        MUON_DTYPE.pop()


def test_muon_in_bfloat16_is_torch_s():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    pair = (
        optimizers.Muon([{"params": ours, "weight_decay": 0.1}], 0.02, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("rule", ["palm", "nanopalm"])
@pytest.mark.parametrize("name", ["stable-adamw", "adafactor", "adamw"])
def test_decay_by_powers_of_the_rate(name: OptimizerName, rule: Any):
    check_follows_its_equations(OptimSettings(name=name, decay_rule=rule, schedule="palm"))


def _biased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_debiased", lambda beta, step: beta)


def _unclipped_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "clamp_min", lambda self, least: torch.ones_like(self))


def _unclipped_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Optimizer, "clip", lambda self: 0.0)


def _coupled_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay added to the gradient, as in Adam with an L2 penalty."""
    chunks = Listwise._chunks

    def coupled(self: Listwise) -> Iterator[Chunk]:
        for chunk in chunks(self):
            decay = chunk.group["weight_decay"]
            pairs = zip(chunk.gradients, chunk.parameters, strict=True)
            gradients = [g + decay * p for g, p in pairs]
            yield replace(chunk, gradients=gradients, group=chunk.group | {"weight_decay": 0.0})

    monkeypatch.setattr(Listwise, "_chunks", coupled)


def _one_scale_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "SCALE_FLOOR", 1.0)


def _momentum_of_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lion's two betas the wrong way round."""
    update = optimizers.Lion.update

    def swapped(self: Any, chunk: Chunk, *rest: Any) -> None:
        group = chunk.group | {"beta1": chunk.group["beta2"], "beta2": chunk.group["beta1"]}
        update(self, replace(chunk, group=group), *rest)

    monkeypatch.setattr(optimizers.Lion, "update", swapped)


def _one_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    ages = Listwise._of_equal_age
    monkeypatch.setattr(
        Listwise,
        "_of_equal_age",
        lambda self, parameters: {k + 1: v for k, v in ages(self, parameters).items()},
    )


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("stable-adamw", _biased),
        ("stable-adamw", _unclipped_updates),
        ("stable-adamw", _unclipped_gradient),
        ("stable-adamw", _coupled_decay),
        ("stable-adamw", _one_step_ahead),
        ("adafactor", _coupled_decay),
        ("adafactor", _one_scale_for_all),
        ("adafactor", _one_step_ahead),
        ("lion", _coupled_decay),
        ("lion", _momentum_of_the_new),
        ("adamw", _unclipped_gradient),
    ],
)
def test_bugs_are_seen(
    name: OptimizerName, bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_follows_its_equations(OptimSettings(name=name))


def _optimi(model: Transformer, s: OptimSettings) -> torch.optim.Optimizer:
    optimi = pytest.importorskip("optimi")
    betas = (s.beta1, s.beta2)
    # Its kernels are for GPUs, and are its default wherever triton is installed.
    how = {"weight_decay": 0.1, "eps": s.eps, "triton": False}
    return optimi.StableAdamW(model.parameters(), 1e-2, betas, **how)


def _lion_pytorch(model: Transformer, s: OptimSettings) -> torch.optim.Optimizer:
    library = pytest.importorskip("lion_pytorch")
    return library.Lion(model.parameters(), 1e-2, (s.beta1, s.beta2), weight_decay=0.1)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("stable-adamw", _optimi, optimizers.StableAdamW),
        ("lion", _lion_pytorch, optimizers.Lion),
    ],
)
def test_a_hundred_steps_are_those_of_a_library(name: OptimizerName, theirs: Any, ours: Any):
    settings = OptimSettings(name=name).resolved()
    model = model_in_float64()
    other = copy.deepcopy(model)
    reference = theirs(other, settings)
    moments = {"beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps}
    optimizer = ours(model.parameters(), 1e-2, weight_decay=0.1, **moments)
    for t in range(1, STEPS + 1):
        give_gradients(model, other, t)
        for by in (optimizer, reference):
            by.step()
            by.zero_grad()
        assert distance(model, other) < CLOSE


def test_a_tensor_without_a_gradient_keeps_its_own_count():
    """One that joins at step 3 is debiased as at its own step 1."""
    early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = optimizers.StableAdamW([early, late], 0.1, beta1=0.9, beta2=0.99, eps=1e-6)
    for t in range(3):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if t == 2 else None
        optimizer.step()
    assert torch.allclose(late, torch.full((3,), 0.9))
    assert torch.allclose(early, torch.full((3,), 0.7))


def test_a_gradient_that_bursts_does_not_move_stable_adamw_further():
    """After quiet steps a gradient 1000 times as large moves AdamW further; this one slower."""
    moved: dict[OptimizerName, float] = {}
    for name in ("adamw", "stable-adamw"):
        settings = OptimSettings(name=name, beta1=0.0, beta2=0.99, weight_decay=0.0)
        model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(4, 4))})
        optimizer = Optimizer(model, settings, 0.1)
        for size in [1.0] * 50 + [1000.0]:
            before = model["w"].detach().clone()
            model["w"].grad = torch.full((4, 4), size)
            optimizer.step(1.0)
        moved[name] = float((model["w"].detach() - before).abs().max())
    assert moved["adamw"] > 0.5
    assert moved["stable-adamw"] == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_short_run_learns(name: OptimizerName):
    batch = ragged(rows=2)
    trainer = trainer_of(
        loader=Repeating(batch), optim=OptimSettings(name=name), lr=3 * RATES[name], steps=80
    )
    losses = [trainer.train_step().loss for _ in range(80)]
    assert losses[0] > 3
    assert losses[-1] < 0.5 * losses[0]


KINDS: list[tuple[type[Listwise], dict[str, Any]]] = [
    (optimizers.AdamW, {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}),
    (optimizers.StableAdamW, {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6}),
    (optimizers.Lion, {"beta1": 0.9, "beta2": 0.99}),
    (optimizers.Adafactor, {"beta1": 0.9, "eps": 1e-30}),
    (optimizers.Muon, {"dtype": torch.float32}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_moments_in_the_cpus_memory_change_no_bit(
    kind: type[Listwise], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """On a CPU the copies stay on it, but are taken and brought back as from a GPU."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(2)]
    lent = copy.deepcopy(kept)
    usual, offloaded = kind(kept, 0.1, **options), kind(lent, 0.1, offload=True, **options)
    updated = list[int]()
    update = kind.update

    def watched(self: Listwise, chunk: Chunk, moments: Any, norms: Any) -> None:
        updated.extend(moment.data_ptr() for slot in moments for moment in slot)
        update(self, chunk, moments, norms)

    monkeypatch.setattr(kind, "update", watched)
    for _ in range(3):
        for a, b in zip(kept, lent, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        usual.step()
        updated.clear()
        offloaded.step()
        for a, b in zip(kept, lent, strict=True):
            assert torch.equal(a, b)
            for slot in kind.slots:
                assert torch.equal(usual.state[a][slot], offloaded.state[b][slot])
                assert offloaded.state[b][slot].data_ptr() not in updated  # else nothing is lent


def test_moments_of_parameters_on_a_cpu_are_not_lent():
    assert not Optimizer(made(), OptimSettings(), 1e-3, offload=True).offload
