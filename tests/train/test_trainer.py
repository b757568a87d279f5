"""The arithmetic of a step, what is skipped, and that a restored trainer never stopped."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train_samples import (
    Repeating,
    made,
    ragged,
    random_loader,
    rows_of,
    same,
    tiny,
    trainer_of,
    weights,
)

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.errors import TrainingError
from openpalm.train.config import OptimSettings
from openpalm.train.objective import NextToken
from openpalm.train.trainer import Trainer


def gradient(trainer: Trainer) -> Tensor:
    parts = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat(parts)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (3, 3), (5, 1), (1, 2, 3)])
def test_microbatches_give_the_gradient_of_one_batch(sizes: tuple[int, ...]):
    batch = ragged()
    whole = trainer_of()
    logits = whole.model.logits(batch.inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    loss.backward()  # torch's own mean over all counted targets
    expected = gradient(whole)

    cut = trainer_of()
    found, count, _ = cut.forward_backward(rows_of(batch, *sizes))
    assert count == int((batch.targets != IGNORE).sum())
    assert math.isclose(found, loss.item(), rel_tol=1e-6)
    assert distance(gradient(cut), expected) < 1e-6


def test_a_mean_of_microbatch_means_would_be_another_gradient():
    """Else the test above could not fail."""
    batch = ragged()
    right, wrong = trainer_of(), trainer_of()
    right.forward_backward([batch])
    for row in rows_of(batch, *[1] * 6):
        wrong.forward_backward([row])
    assert distance(gradient(wrong) / 6, gradient(right)) > 0.01


def test_a_microbatch_without_targets_adds_nothing():
    batch = ragged()
    silent = Batch(batch.inputs, torch.full_like(batch.targets, IGNORE))
    alone, beside = trainer_of(), trainer_of()
    loss, count, _ = alone.forward_backward([batch])
    assert beside.forward_backward([silent, batch, silent])[:2] == (loss, count)
    assert torch.equal(gradient(beside), gradient(alone))


def test_metrics_are_divided_by_the_global_count():
    class Counting(NextToken):
        def loss(self, model, batch, /):
            return super().loss(model, batch)[0], {"right": float(self.count(batch))}

    trainer = trainer_of(objective=Counting())
    assert trainer.forward_backward(rows_of(ragged(), 1, 2, 3))[2] == {"right": 1.0}


def test_forward_backward_and_optimizer_step_are_separate():
    trainer = trainer_of()
    before = weights(trainer.model)
    loss, count, _ = trainer.forward_backward([ragged()])
    assert same(weights(trainer.model), before)
    held = gradient(trainer)
    norm, skipped = trainer.optimizer_step(loss, count, 1.0)
    assert skipped is None
    assert math.isclose(norm, float(held.norm()), rel_tol=1e-5)
    assert not same(weights(trainer.model), before)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_train_step_takes_one_global_batch():
    loader = random_loader(rows=2)
    trainer = trainer_of(loader=loader, accumulation=3)
    report = trainer.train_step()
    assert loader.state_dict()["rows_consumed"] == 6
    assert (report.step, report.count) == (1, 6 * 12)
    assert report.skipped is None
    assert trainer.counted == 6 * 12
    assert trainer.train_step().step == 2


def test_a_repeated_sequence_is_memorised():
    batch = ragged(rows=2)
    trainer = trainer_of(loader=Repeating(batch), steps=80)
    losses = [trainer.train_step().loss for _ in range(80)]
    assert losses[0] > 3
    assert losses[-1] < 0.1


class Broken(NextToken):
    """Next-token loss that fails in a given way at given calls (from 1)."""

    def __init__(self, how: str, *calls: int):
        self.how, self.calls, self.called = how, calls, 0

    def count(self, batch: Batch, /) -> int:
        self.called += 1
        broken = self.how == "count" and self.called in self.calls
        return 0 if broken else super().count(batch)

    def loss(self, model, batch, /):
        loss, metrics = super().loss(model, batch)
        if self.called in self.calls and self.how == "loss":
            loss = loss * float("nan")
        if self.called in self.calls and self.how == "gradient":
            loss = loss + (model.embedding[0, 0] - model.embedding[0, 0].detach()).abs().sqrt()
        return loss, metrics


SKIPS = {
    "count": "nothing to count",
    "loss": "loss not finite",
    "gradient": "gradient not finite",
}


@pytest.mark.parametrize("how", SKIPS)
def test_a_skipped_step_changes_no_bit(how: str):
    trainer = trainer_of(objective=Broken(how, 2, 3))
    assert trainer.train_step().skipped is None
    before, moments = weights(trainer.model), trainer.optimizer.state_tensors()
    moments = {name: value.clone() for name, value in moments.items()}
    for row in (1, 2):
        report = trainer.train_step()
        assert report.skipped == SKIPS[how]
        assert report.step == 1 + row
        assert trainer.skipped_in_a_row == row
        assert same(weights(trainer.model), before)
        assert same(trainer.optimizer.state_tensors(), moments)
    if how == "gradient":
        assert math.isfinite(report.loss)  # else it would test the loss again
        assert not math.isfinite(report.grad_norm)
    good = trainer.train_step()
    assert good.skipped is None
    assert trainer.skipped_in_a_row == 0
    assert not same(weights(trainer.model), before)
    assert all(torch.isfinite(value).all() for value in weights(trainer.model).values())


def test_a_skipped_step_leaves_no_gradient_to_the_next():
    broken = trainer_of(loader=Repeating(ragged()), objective=Broken("gradient", 1))
    clean = trainer_of(loader=Repeating(ragged()))
    broken.train_step()
    clean.step = 1  # so that both take their step at the same learning rate
    broken.train_step()
    clean.train_step()
    assert same(weights(broken.model), weights(clean.model))


def test_skips_in_a_row_stop_the_run_and_a_good_step_starts_over():
    trainer = trainer_of(objective=Broken("loss", 1, 2, 4, 5, 6), max_skipped_steps=3)
    reports = [trainer.train_step() for _ in range(5)]
    assert [bool(report.skipped) for report in reports] == [True, True, False, True, True]
    with pytest.raises(TrainingError, match=r"step 6: loss not finite, 3 steps in a row.*--optim"):
        trainer.train_step()


@pytest.mark.parametrize("name", ["adamw", "stable-adamw", "lion", "adafactor", "muon"])
def test_restored_equals_uninterrupted(name: str):
    """With dropout on, a scheduled learning rate, and noise in the global random state between."""
    settings = OptimSettings(name=name)  # type: ignore[arg-type]
    config = tiny(dropout=0.2, qk_norm=True)

    def fresh(loader_seed: int = 0) -> Trainer:
        loader = random_loader(rows=2, seed=loader_seed)
        return trainer_of(made(config), loader, optim=settings, steps=10, accumulation=2)

    torch.manual_seed(1)
    uninterrupted = fresh()
    expected = [uninterrupted.train_step() for _ in range(10)]

    torch.manual_seed(1)
    first = fresh()
    reports = [first.train_step() for _ in range(4)]
    tensors, values = first.state()
    tensors = {key: value.clone() for key, value in tensors.items()}
    torch.manual_seed(99)
    second = fresh()
    for parameter, value in zip(
        second.model.parameters(), weights(first.model).values(), strict=True
    ):
        parameter.data.copy_(value)
    second.restore(tensors, values)
    reports += [second.train_step() for _ in range(6)]
    assert reports == expected
    assert second.counted == uninterrupted.counted
    assert same(weights(second.model), weights(uninterrupted.model))


def test_dropout_is_drawn_anew_in_every_step_and_needs_no_saved_state():
    """Else the test above could not fail."""
    drawn = []
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        trainer = trainer_of(made(tiny(dropout=0.2)))
        trainer.seed, trainer.step = seed, step
        torch.manual_seed(len(drawn))  # what was drawn before does not matter
        drawn.append(trainer.train_step().loss)
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


def test_bfloat16_steps_keep_float32_weights():
    exact, rounded = trainer_of(), trainer_of(dtype=torch.bfloat16)
    a, b = exact.train_step(), rounded.train_step()
    assert a.loss != b.loss
    assert math.isclose(a.loss, b.loss, rel_tol=0.01)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.float32}
