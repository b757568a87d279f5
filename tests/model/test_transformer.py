"""The model is its equations, cached or not, in every shape."""

import dataclasses
from dataclasses import replace

import numpy_reference
import pytest
import torch
from small_models import BASE, SHAPES, ids_for, make

from openpalm.errors import SettingsError
from openpalm.model.cache import KVCache
from openpalm.model.config import config_from_json
from openpalm.model.transformer import Transformer, initialise

DECODERS = {name: config for name, config in SHAPES.items() if config.causal}
CLOSE = 2e-5


@pytest.mark.parametrize("name", SHAPES)
def test_logits_follow_the_equations(name: str):
    config = SHAPES[name]
    model = make(config)
    ids = ids_for(config)
    if not config.causal:
        ids[1, 13:] = -1  # padding
    weights = {key: p.double().numpy() for key, p in model.named_parameters()}
    expected = torch.from_numpy(numpy_reference.logits(config, weights, ids.numpy()))
    got = model.logits(ids)
    assert got.dtype == torch.float32
    real = ids >= 0
    assert (got[real] - expected[real]).abs().max() < 1e-4


def test_head_of_the_residual_is_logits_and_norm_is_hidden():
    model, ids = make(BASE), ids_for(BASE)
    residual = model.residual(ids)
    assert torch.equal(model.head(residual), model.logits(ids))
    assert torch.equal(model.norm(residual), model.hidden(ids))


def test_padding_of_an_encoder_changes_nothing_for_others():
    config = SHAPES["encoder"]
    model, ids = make(config), ids_for(config)
    padded = torch.cat([ids, torch.full((2, 5), -1)], dim=1)
    assert (model.logits(padded)[:, :20] - model.logits(ids)).abs().max() < CLOSE


def test_the_future_is_not_seen():
    model, ids = make(SHAPES["xpos"]), ids_for(BASE)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % BASE.vocab_size
    assert torch.equal(model.logits(ids)[:, :12], model.logits(changed)[:, :12])


@pytest.mark.parametrize("vocab", [50, 64, 65])
def test_padding_columns_never_appear(vocab: int):
    config = replace(BASE, vocab_size=vocab)
    model = make(config)
    model.embedding[vocab:] = 1e9
    assert model.embedding.shape[0] % 64 == 0
    assert model.logits(ids_for(config)).shape == (2, 20, vocab)
    assert model.logits(ids_for(config)).abs().max() < 1e3


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 9, 4], [19, 1]], ids=["single", "chunks", "last"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_is_uncached(name: str, chunks: list[int]):
    config = DECODERS[name]
    model, ids = make(config), ids_for(config)
    cache = KVCache(config, slots=2, length=20)
    parts = [model.logits(part, cache) for part in ids.split(chunks, dim=1)]
    assert cache.lengths == [20, 20]
    assert (torch.cat(parts, dim=1) - model.logits(ids)).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["multi-query", "xpos", "gpt-j"])
def test_ragged_batch_is_each_alone(name: str):
    config = DECODERS[name]
    model, ids = make(config), ids_for(config, rows=3)
    prompts = [11, 4, 8]
    cache = KVCache(config, slots=3, length=24)
    residual = model.residual(ids[:, :11], cache, counts=prompts)
    for row, count in enumerate(prompts):
        alone = model.residual(ids[row : row + 1, :count])
        assert (residual[row, :count] - alone[0]).abs().max() < CLOSE
    for step in range(6):  # each row goes on from its own length
        new = torch.stack([ids[row, count + step] for row, count in enumerate(prompts)])
        got = model.logits(new[:, None], cache)[:, 0]
        for row, count in enumerate(prompts):
            alone = model.logits(ids[row : row + 1, : count + step + 1])[0, -1]
            assert (got[row] - alone).abs().max() < CLOSE


def test_slots_move_and_are_copied_whole():
    """Swapped, copied in part, grown, and read through a span: the same logits as uncached."""
    model, ids = make(BASE), ids_for(BASE, rows=3)
    cache = KVCache(BASE, slots=3, length=12)
    model.residual(ids[:, :10], cache, counts=[10, 3, 7])
    cache.swap(0, 2)
    cache.copy_slot(0, 1, 5)
    cache.grow(20)
    assert cache.lengths == [7, 5, 10]
    span = cache.span(0, 2)
    new = torch.stack([ids[2, 7], ids[2, 5]])[:, None]
    got = model.logits(new, span)[:, 0]
    assert (got[0] - model.logits(ids[2:3, :8])[0, -1]).abs().max() < CLOSE
    assert (got[1] - model.logits(ids[2:3, :6])[0, -1]).abs().max() < CLOSE
    assert span.lengths == [8, 6]
    assert cache.lengths == [7, 5, 10]
    last = model.logits(ids[0:1, 10:11], cache.span(2, 3))[0, 0]
    assert (last - model.logits(ids[0:1, :11])[0, -1]).abs().max() < CLOSE


def test_a_full_cache_and_a_cached_encoder_are_our_bugs():
    model, ids = make(BASE), ids_for(BASE)
    with pytest.raises(AssertionError, match="do not fit"):
        model.logits(ids, KVCache(BASE, slots=2, length=19))
    encoder = SHAPES["encoder"]
    with pytest.raises(AssertionError, match="no cache"):
        make(encoder).logits(ids, KVCache(encoder, slots=2, length=20))


def test_longer_than_the_context_is_extrapolation():
    config = SHAPES["xpos"]
    model = make(config)
    ids = ids_for(config, rows=1, time=3 * config.context)
    whole = model.logits(ids)
    assert (whole[:, :10] - make(config).logits(ids[:, :10])).abs().max() < CLOSE
    assert whole.isfinite().all()


def test_xpos_refuses_lengths_whose_powers_leave_float32():
    config = replace(BASE, xpos_base=2.0)
    with pytest.raises(SettingsError, match=r"200 tokens are too many .* stay below \d+ tokens"):
        make(config).logits(torch.zeros(1, 200, dtype=torch.long))
    assert make(config).logits(torch.zeros(1, 140, dtype=torch.long)).isfinite().all()


def test_xpos_scores_depend_on_differences_of_positions_only():
    near, far = SHAPES["xpos"], replace(SHAPES["xpos"], context=4)  # other centres
    ids = ids_for(near)
    assert (make(near).logits(ids) - make(far).logits(ids)).abs().max() < CLOSE


def test_initialise_is_the_same_for_a_seed_and_dtype():
    first, second, other = (Transformer(BASE) for _ in range(3))
    initialise(first, 3)
    initialise(second.to(torch.bfloat16), 3)
    initialise(other, 4)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b)
    assert not torch.equal(first.embedding, other.embedding)
    assert not first.embedding[BASE.vocab_size :].any()


@torch.no_grad()
def check_starts_as_palm(model: Transformer) -> None:
    """Chowdhery et al. 2022, section 5; logits of a tied head then have deviation 1."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            wanted = 1.0 if name == "embedding" else parameter.shape[1] ** -0.5
            assert float(parameter.std()) == pytest.approx(wanted, rel=0.05), name
    ids = torch.randint(model.config.vocab_size, (4, 64))
    assert float(model.logits(ids).std()) == pytest.approx(1.0, rel=0.25)


WIDE = replace(BASE, vocab_size=256, dim=64, heads=4, head_dim=16, ff_dim=256, logit_scale=64**-0.5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_papers_initialisation(tied: bool):
    config = replace(WIDE, tied=tied, logit_scale=WIDE.logit_scale if tied else 1.0)
    model = Transformer(config)
    initialise(model, 0, "palm")
    check_starts_as_palm(model)


@pytest.mark.parametrize("bug", ["default matrices", "unscaled logits"])
def test_another_start_is_noticed(bug: str):
    model = Transformer(replace(WIDE, logit_scale=1.0) if bug == "unscaled logits" else WIDE)
    initialise(model, 0, "default" if bug == "default matrices" else "palm")
    with pytest.raises(AssertionError):
        check_starts_as_palm(model)


def test_a_config_from_before_logits_were_scaled_reads():
    old = dataclasses.asdict(BASE)
    del old["logit_scale"]
    assert config_from_json(old, "config.json") == BASE
    with pytest.raises(SettingsError, match=r"logit_scale \(0\) must be above 0"):
        replace(BASE, logit_scale=0)


def test_dropout_works_in_training_only():
    config = replace(BASE, dropout=0.5)
    model, ids = make(config), ids_for(config)
    assert torch.equal(model.logits(ids), make(BASE).logits(ids))
    model.train()
    assert not torch.equal(model.logits(ids), model.logits(ids))


def test_bfloat16_stays_near_float32():
    ids = ids_for(BASE)
    exact, rough = make(BASE), make(BASE).to(torch.bfloat16)
    difference = (rough.logits(ids) - exact.logits(ids)).abs().max()
    assert 0 < difference < 0.05 * exact.logits(ids).abs().max()
