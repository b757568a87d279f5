"""The gradient noise scale against gradients of known mean and covariance."""

import math

import layout_runs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from train_samples import ragged, random_loader, rows_of, same, trainer_of, weights

from openpalm.data.batches.loader import IGNORE
from openpalm.errors import SettingsError
from openpalm.train.objective import NextToken
from openpalm.train.optimization import noise_scale
from openpalm.train.optimization.noise_scale import NoiseScale, estimates
from openpalm.train.trainer import Trainer

MEAN, DEVIATION = 0.3, torch.linspace(0.2, 2.0, 24)
G, S = 24 * MEAN**2, float(DEVIATION.square().sum())
"""Squared norm of the true gradient, and the trace of its covariance, of the linear model below."""


def samples(generator: torch.Generator, count: int) -> Tensor:
    """Gradients of `count` samples of the loss x w, whose gradient is x."""
    return MEAN + DEVIATION * torch.randn(count, 24, generator=generator)


@pytest.mark.parametrize("counts", [(4, 4), (2, 2, 2, 2), (1, 3, 8)])
def test_the_averages_find_a_known_covariance(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(noise_scale, "DECAY", 0.9995)
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(24))
    noise = NoiseScale([w])
    found = {}
    for _ in range(4000):
        micro = [samples(generator, n) for n in counts]
        for number, x in enumerate(micro):
            w.grad = x.sum(0) / sum(counts) * 2.0**10
            noise.take(number)
        found = noise.metrics(counts, loss_scale=2.0**10)
        assert torch.equal(w.grad, noise_sum(micro, counts))
        w.grad = None
    assert found["noise/g"] == pytest.approx(G, rel=0.05)
    assert found["noise/s"] == pytest.approx(S, rel=0.03)
    assert found["noise/b_simple"] == pytest.approx(S / G, rel=0.08)


def noise_sum(micro: list[Tensor], counts: tuple[int, ...]) -> Tensor:
    """The sum that autograd would accumulate."""
    total = torch.zeros(24)
    for number, x in enumerate(micro):
        part = x.sum(0) / sum(counts) * 2.0**10
        total = total + part if number else part
    return total


def test_the_square_of_the_mean_norm_is_biased():
    """mesh-transformer-jax's estimate, on two normal gradients with covariance I of two numbers.

    E |a|^2 = 2 is s. The square of the mean of two norms is on average (2 + pi / 2) / 2, and so
    that estimate pi / 2.
    """
    a, b = torch.randn(2, 20000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = ((a + b) / 2).square().sum(-1)
    mean_norm = (a.norm(dim=-1) + b.norm(dim=-1)) / 2
    squares = zip(a.square().sum(-1).tolist(), b.square().sum(-1).tolist(), strict=True)
    pairs = zip(squares, whole.tolist(), strict=True)
    ours = [estimates(two, [1, 1], w) for two, w in pairs]
    assert sum(s for _, s in ours) / 20000 == pytest.approx(2, rel=0.02)
    assert sum(g for g, _ in ours) / 20000 == pytest.approx(0, abs=0.02)
    theirs = 2 * (mean_norm.square() - whole)
    assert float(theirs.mean()) == pytest.approx(math.pi / 2, rel=0.02)


def noisy(**options) -> Trainer:
    options = {"noise_scale": True, "accumulation": 3, "loader": random_loader()} | options
    return trainer_of(**options)


def test_the_gradients_of_microbatches_are_compared():
    """Against gradients taken one microbatch at a time."""
    batches = rows_of(ragged(), 1, 2, 3)
    counts = [NextToken().count(batch) for batch in batches]
    squares = []
    for batch in batches:
        alone = trainer_of()
        alone.forward_backward([batch])
        squares.append(square(alone))
    whole = trainer_of()
    whole.forward_backward(batches)
    g, s = estimates(squares, counts, square(whole))
    trainer = noisy()
    metrics = trainer.forward_backward(batches)[2]
    assert metrics["noise/g"] == pytest.approx(g, rel=1e-4)
    assert metrics["noise/s"] == pytest.approx(s, rel=1e-4)
    gradients = [[p.grad for p in t.model.parameters()] for t in (trainer, whole)]
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def square(trainer: Trainer) -> float:
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return math.fsum(float(g.double().square().sum()) for g in gradients)


def test_training_is_the_same_bit_for_bit_and_resumes():
    usual, whole, first = noisy(noise_scale=False), noisy(), noisy()
    for _ in range(4):
        usual.train_step()
    reports = [whole.train_step() for _ in range(4)]
    assert same(weights(usual.model), weights(whole.model))
    for _ in range(2):
        first.train_step()
    tensors, values = first.state()
    second = noisy(model=first.model)
    second.restore({name: value.clone() for name, value in tensors.items()}, values)
    assert [second.train_step() for _ in range(2)] == reports[2:]


def test_one_microbatch_gives_no_estimate_and_keeps_the_last():
    trainer = noisy()
    assert "noise/s" not in trainer.forward_backward([ragged()])[2]
    trainer.optimizer.zero_grad()
    found = trainer.forward_backward(rows_of(ragged(), 3, 3))[2]
    trainer.optimizer.zero_grad()
    assert trainer.forward_backward([ragged()])[2] == found


@pytest.mark.parametrize(
    ("sequences", "remedy"),
    [(16, "give --microbatch-tokens 256"), (1, "give --batch-tokens 64 or more")],
)
def test_a_step_of_one_microbatch_is_refused(sequences: int, remedy: str):
    with pytest.raises(SettingsError, match=f"--noise-scale: .*; {remedy}"):
        layout_runs.trainer_for(noise_scale=True, accumulation=1, sequences=sequences)


def test_averages_of_a_damaged_checkpoint_are_refused():
    for state in ({}, {"g": 1.0, "s": 1.0, "weight": 2.0}):
        with pytest.raises((KeyError, ValueError)):
            NoiseScale([]).restore(state)


@pytest.mark.parametrize("sizes", [(6,), (1, 2, 3), (5, 1)])
def test_last_loss_is_the_mean_at_the_last_position_of_rows_that_count_it(sizes: tuple[int, ...]):
    batch = ragged()
    batch.targets[2:4, -1] = 7  # else only the first row counts its last position
    trainer = trainer_of(objective=NextToken(last=True))
    metrics = trainer.forward_backward(rows_of(batch, *sizes))[2]
    logits = trainer.model.logits(batch.inputs)[:, -1]
    wanted = F.cross_entropy(logits, batch.targets[:, -1], ignore_index=IGNORE)
    assert metrics == {"last_loss": pytest.approx(wanted.item(), rel=1e-5)}


def test_last_loss_is_left_out_where_no_row_counts_its_last_position():
    batch = ragged()
    batch.targets[:, -1] = IGNORE
    assert trainer_of(objective=NextToken(last=True)).forward_backward([batch])[2] == {}
