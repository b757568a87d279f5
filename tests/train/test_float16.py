"""float16 with loss scaling: close to float32, overflows skipped, resumed as if never stopped."""

import math

import pytest
import torch
from train_samples import random_loader, same, trainer_of, weights

from openpalm.errors import TrainingError
from openpalm.train.objective import NextToken
from openpalm.train.optimization import loss_scale
from openpalm.train.optimization.loss_scale import LossScale
from openpalm.train.trainer import Trainer


class TooLarge(torch.autograd.Function):
    """Zero; its gradient is `size` times the loss's, computed in float16."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.shape, ctx.size = x.shape, size
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return (grad * ctx.size).half().float().expand(ctx.shape), None


class Overflowing(NextToken):
    """Next-token loss with a gradient that overflows at some calls (from 1)."""

    def __init__(self, size: float, *calls: int):
        self.size, self.calls, self.called = size, calls, 0

    def loss(self, model, batch, /):
        loss, metrics = super().loss(model, batch)
        self.called += 1
        if self.called in self.calls:
            loss = loss + TooLarge.apply(model.embedding, self.size)
        return loss, metrics


# The loss is divided by 48 tokens: 2^16 / 48 * 64 is above 65504, float16's largest; half is below.
ONCE = 64.0
ALWAYS = 1e9


def float16_trainer(objective: NextToken | None = None, **options) -> Trainer:
    options = {"steps": 20, "loader": random_loader()} | options
    return trainer_of(objective=objective or NextToken(), dtype=torch.float16, **options)


def test_twenty_steps_are_close_to_float32():
    half, exact = float16_trainer(), trainer_of(loader=random_loader(), steps=20)
    for step in range(20):
        found, wanted = half.train_step(), exact.train_step()
        assert found.skipped is None
        assert found.metrics["loss_scale"] == 2.0**16
        assert found.loss == pytest.approx(wanted.loss, rel=2e-3)
        if step == 0:
            assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-2)


def test_the_scale_is_undone_before_clipping():
    """Gradients at scale 2^16 and at scale 1 differ only by numbers too small for float16."""
    scaled, plain = float16_trainer(), float16_trainer()
    assert plain.loss_scale is not None
    plain.loss_scale.scale = 1.0
    norms = [trainer.train_step().grad_norm for trainer in (scaled, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] < 100


def test_an_overflow_halves_the_scale_and_skips_the_step():
    trainer = float16_trainer(Overflowing(ONCE, 2, 3))
    trainer.train_step()
    before = weights(trainer.model)
    report = trainer.train_step()
    assert report.skipped == "gradient overflow in float16, loss scale lowered to 32768"
    assert report.metrics["loss_scale"] == 2.0**15
    assert math.isfinite(report.loss)
    assert same(weights(trainer.model), before)
    assert trainer.train_step().skipped is None
    assert not same(weights(trainer.model), before)


def test_overflows_are_divergence_only_at_the_least_scale():
    trainer = float16_trainer(Overflowing(ALWAYS, *range(1, 40)), max_skipped_steps=3, steps=40)
    for step in range(16):
        assert trainer.train_step().metrics["loss_scale"] == 2.0 ** (15 - step)
    assert trainer.skipped_in_a_row == 0
    assert trainer.train_step().skipped == "gradient not finite"
    trainer.train_step()
    with pytest.raises(TrainingError, match="step 19: gradient not finite, 3 steps in a row"):
        trainer.train_step()


def test_the_scale_doubles_after_many_good_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    trainer = float16_trainer(Overflowing(ONCE, 2))
    scales = [trainer.train_step().metrics["loss_scale"] for _ in range(8)]
    assert [math.log2(scale) for scale in scales] == [16, 15, 15, 15, 16, 16, 16, 17]


def test_a_resumed_run_continues_with_its_scale(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 4)
    whole, first = float16_trainer(Overflowing(ONCE, 2)), float16_trainer(Overflowing(ONCE, 2))
    reports = [whole.train_step() for _ in range(8)]
    for _ in range(4):
        first.train_step()
    tensors, values = first.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    second = float16_trainer(model=first.model)
    second.restore(tensors, values)
    assert [second.train_step() for _ in range(4)] == reports[4:]
    assert same(weights(second.model), weights(whole.model))


@pytest.mark.parametrize(
    "state", [{}, {"scale": 0.5, "good_steps": 0}, {"scale": 8.0, "good_steps": -1}]
)
def test_a_damaged_scale_is_refused(state: dict):
    with pytest.raises((KeyError, ValueError)):
        LossScale().restore(state)
