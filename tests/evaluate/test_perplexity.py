"""Loss over a split against one window at a time, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny

from openpalm.data.batches.loader import evaluation_batches
from openpalm.evaluate.perplexity import SplitLoss, split_loss


def tokens(count, vocab=265, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.uint16)


@torch.no_grad()
def one_window_at_a_time(model, ids, length):
    """Nats of every token but the first, each window begun without context."""
    nats, count = 0.0, 0
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor(ids[start : start + length + 1].astype(np.int64))
        logits = model.logits(window[None, :-1])[0].double()
        for position, target in enumerate(window[1:]):
            chances = logits[position].exp()
            nats -= math.log(chances[target] / chances.sum())
            count += 1
    return nats, count


@pytest.mark.parametrize(
    ("count", "length", "rows"),
    [(2, 8, 4), (9, 8, 4), (10, 8, 4), (33, 8, 4), (34, 8, 1), (100, 8, 3), (50, 64, 2)],
)
def test_split_loss_is_one_window_at_a_time(count, length, rows):
    model, ids = tiny(), tokens(count)
    found = split_loss(model, evaluation_batches(ids, sequence_length=length, rows=rows), 77)
    nats, targets = one_window_at_a_time(model, ids, length)
    assert (found.tokens, found.bytes) == (targets, 77)
    assert targets == count - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.nats_per_token == pytest.approx(nats / targets, rel=1e-5)


@pytest.mark.parametrize("vocab", [70, 256, 265])
def test_a_uniform_model_costs_log2_of_the_vocabulary(vocab):
    """Of the vocabulary, not of its padded table."""
    model, ids = tiny(vocab_size=vocab), tokens(101, vocab)
    with torch.no_grad():
        model.embedding.zero_()
    batches = evaluation_batches(ids, sequence_length=16, rows=2)
    found = split_loss(model, batches, text_bytes=250)
    assert found.nats_per_token == pytest.approx(math.log(vocab), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(vocab) * 100 / 250, rel=1e-6)


def test_arithmetic_of_a_known_sum():
    loss = SplitLoss(nats=8 * math.log(2), tokens=4, bytes=16)
    assert loss.bits_per_byte == pytest.approx(0.5)
    assert loss.nats_per_token == pytest.approx(2 * math.log(2))


def test_measuring_changes_nothing_and_needs_no_gradient():
    model, ids = tiny(dropout=0.5), tokens(60)
    before = [parameter.clone() for parameter in model.parameters()]

    def measured():
        model.train()
        return split_loss(model, evaluation_batches(ids, sequence_length=16, rows=2), 60)

    assert measured() == measured()  # dropout is off
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bfloat16_is_close_to_float32():
    model, ids = tiny(), tokens(200)

    def nats(dtype):
        batches = evaluation_batches(ids, sequence_length=32, rows=4)
        return split_loss(model, batches, 200, dtype).nats_per_token

    assert nats(torch.bfloat16) == pytest.approx(nats(torch.float32), rel=0.02)
    assert nats(torch.bfloat16) != nats(torch.float32)
