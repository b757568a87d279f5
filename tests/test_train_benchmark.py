"""benchmarks/train.py is fair: one loop, one measure of loss, peers of equal size."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers_train
import train_common
import train_minutes

from openpalm.data.batches.loader import evaluation_batches
from openpalm.evaluate.perplexity import split_loss
from openpalm.model.config import ModelConfig, preset
from openpalm.model.transformer import Transformer, initialise

CONFIG = replace(train_common.sized("palm-tiny", 32), dim=64, head_dim=16)


def rules(dtype: torch.dtype = torch.float32) -> peers_train.Rules:
    return peers_train.Rules(CONFIG, dtype, torch.device("cpu"), steps=6, lr=3e-3)


class OursAsPeer(peers_train.Peer):
    """Our model in the loop that the peers get."""

    name = "ours"

    def build(self, config: ModelConfig) -> nn.Module:
        model = Transformer(config)
        initialise(model, seed=0)
        return model

    def forward(self, ids: Tensor) -> Tensor:
        return self.module.logits(ids)


class Unclipped(OursAsPeer):
    def __init__(self, given: peers_train.Rules):
        super().__init__(given)
        self.optimizer.clip = lambda: 0.0


def losses(who: peers_train.Contender) -> list[float]:
    torch.manual_seed(0)
    batches = [train_common.random_batch(CONFIG.vocab_size, 2, 32) for _ in range(6)]
    return [who.step(batch) for batch in batches]


def check_same_loop(peer: type[peers_train.Peer], dtype: torch.dtype) -> None:
    """The peers' loop gives our model the losses that our Trainer gives it.

    Ours rounds the head's gradient to bfloat16 in chunks, the peers' whole.
    """
    close = 1e-5 if dtype == torch.float32 else 1e-4
    ours = losses(peers_train.OpenPalm(rules(dtype)))
    assert losses(peer(rules(dtype))) == pytest.approx(ours, rel=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peers_loop_is_our_trainers(dtype):
    check_same_loop(OursAsPeer, dtype)


def test_a_peer_without_the_clip_would_be_seen():
    with pytest.raises(AssertionError):
        check_same_loop(Unclipped, torch.float32)


@pytest.mark.parametrize("name", ["palm-5m", "palm-14m", "palm-32m"])
def test_nanogpt_is_as_large_as_ours_to_half_a_layer(name):
    config = preset(name).config
    with torch.device("meta"):
        gpt = peers_train.NanoGpt.build(None, config)
    difference = sum(p.numel() for p in gpt.parameters()) - config.parameters
    assert abs(difference) <= 6.1 * config.dim**2


@pytest.mark.parametrize("name", list(peers_train.PEERS))
def test_a_peer_learns_and_looks_at_nothing_later(name):
    found = peers_train.built({name: peers_train.PEERS[name]}, rules())
    if not found:
        pytest.skip(f"{name} is not installed")
    who, batch = found[name], train_common.random_batch(CONFIG.vocab_size, 2, 32)
    told = [who.step(batch) for _ in range(6)]
    assert told[0] == pytest.approx(math.log(CONFIG.vocab_size), abs=0.5)
    assert told[-1] < told[0] - 0.1
    changed = batch.inputs.clone()
    changed[:, 20:] = 0
    torch.testing.assert_close(who.logits(changed)[:, :20], who.logits(batch.inputs)[:, :20])


def test_validation_loss_is_evals():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 500)
    who = peers_train.OpenPalm(rules())
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    batches = evaluation_batches(tokens, sequence_length=CONFIG.context, rows=4)
    expected = split_loss(model, batches, 500).nats_per_token
    assert train_minutes.validation_loss(who, tokens, rules()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [peers_train.OpenPalm, OursAsPeer])
def test_without_moments_nothing_is_kept_beside_the_gradient(make: type):
    who = make(rules())
    optimizer = who.optimizer if isinstance(who, peers_train.Peer) else who._trainer.optimizer
    who.step(train_common.random_batch(CONFIG.vocab_size, 2, 32))
    assert optimizer.state_tensors()
    who.forget_moments()
    who.step(train_common.random_batch(CONFIG.vocab_size, 2, 32))
    assert not optimizer.state_tensors()
