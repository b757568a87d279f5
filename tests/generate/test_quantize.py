"""Quantized and reordered matrices against the plain ones, within the rounding of their format."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KINDS, tiny

from openpalm.base.device import multiplies_int8
from openpalm.errors import SettingsError
from openpalm.generate.engine import Engine
from openpalm.generate.quantize import (
    INT4_GROUP,
    _Int4,
    _Int8,
    _Int8Dot,
    _OneDnn,
    _Widened,
    quantize,
)
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model import lora
from openpalm.model.config import LoraConfig, ModelConfig
from openpalm.model.transformer import Transformer, initialise

quantize_module = importlib.import_module("openpalm.generate.quantize")
IDS = torch.arange(24).reshape(2, 12)


def wide() -> Transformer:
    """Matrices that int4's groups fit."""
    model = Transformer(
        ModelConfig(vocab_size=128, dim=64, depth=2, heads=4, head_dim=16, ff_dim=128)
    )
    initialise(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_float32_is_the_model(kind):
    model = tiny(**KINDS[kind])
    quantized = quantize(model, "float32")
    assert torch.allclose(quantized.logits(IDS), model.logits(IDS), atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_the_model_in_bfloat16():
    model = wide()
    plain = wide().to(torch.bfloat16)
    exact = model.logits(IDS)
    rounded = (plain.logits(IDS) - exact).norm()
    quantized = (quantize(model, "bfloat16").logits(IDS) - exact).norm()
    assert quantized < 1.5 * rounded


ROWS = [1, 2, 3, 7, 8, 16, 40]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("shape", [(265, 32), (512, 768), (768, 3072), (100, 17)])
@torch.no_grad()
def test_in_float32_a_row_alone_is_the_row_among_others(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    matrix = _OneDnn(torch.randn(shape, generator=generator))
    x = torch.randn(max(ROWS), shape[1], generator=generator)
    whole = matrix(x)
    for rows in ROWS:
        assert torch.equal(matrix(x[:rows]), whole[:rows]), rows
    assert torch.equal(matrix(x[None, :1])[0], whole[:1])


@torch.no_grad()
def test_emulated_bfloat16_is_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantize_module, "multiplies_bfloat16", lambda: False)
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    monkeypatch.setattr(
        quantize_module, "WIDENED_ELEMENTS", 64 * 7
    )  # several blocks, the last smaller
    exact = F.linear(x.double(), weight.double())
    matrix = quantize_module.make_matrix(weight, "bfloat16", torch.float32)
    assert isinstance(matrix, _Widened)
    assert (matrix(x) - exact).norm() < 1e-6 * exact.norm()
    model = wide()
    quantized = quantize(model, "bfloat16").logits(IDS)
    rounded = wide().to(torch.bfloat16).logits(IDS) - model.logits(IDS)
    assert (quantized - model.logits(IDS)).norm() < 1.5 * rounded.norm()


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@torch.no_grad()
def test_plain_products_where_onednn_refuses_a_matrix(weights, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("mkldnn_reorder_linear_weight: needs another processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    model = wide()
    found = quantize(model, weights).logits(IDS) - model.logits(IDS)
    assert found.norm() < (1e-5 if weights == "float32" else 0.05) * model.logits(IDS).norm()


def adapted(**changes) -> Transformer:
    model = tiny(**changes)
    lora.attach(model, LoraConfig(3, 12.0, tuple(model.config.matrices)), seed=0)
    for factor in lora.adapter_parameters(model.requires_grad_(False)).values():
        factor += 0.2 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_is_merged_and_the_model_is_unchanged(kind):
    model = adapted(**KINDS[kind])
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model.logits(IDS)
    assert torch.allclose(quantize(model, "float32").logits(IDS), expected, atol=1e-4)
    with lora.detached(model):
        base = quantize(model, "float32").logits(IDS)
    assert (base - expected).abs().max() > 0.1
    assert torch.allclose(base, tiny(**KINDS[kind]).logits(IDS), atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model.logits(IDS), expected)


@torch.no_grad()
def test_the_engine_follows_an_adapter_when_it_is_refreshed():
    model = adapted()
    engine = Engine(model)
    ids = list(range(20))

    def scores_are_the_model_s():
        exact = model.logits(torch.tensor([ids])).log_softmax(-1)[0, :-1]
        exact = exact.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        return torch.allclose(engine.score([ids])[0], exact, atol=1e-4)

    assert scores_are_the_model_s()
    for factor in lora.adapter_parameters(model).values():
        factor *= 1.3
    assert not scores_are_the_model_s()
    engine.refresh(model)
    assert scores_are_the_model_s()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@torch.no_grad()
def test_an_adapter_is_merged_before_it_is_rounded(weights):
    model = adapted()
    merged = lora.merged(model)
    assert torch.equal(quantize(model, weights).logits(IDS), quantize(merged, weights).logits(IDS))


@torch.no_grad()
def test_int8_is_its_rounded_matrix():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(3, 64).to(torch.bfloat16)
    matrix = _Int8(weight)
    rounded = matrix.weight.float() * matrix.scales.float()[:, None]
    assert (rounded - weight).abs().max() <= weight.abs().max() / 127
    assert torch.allclose(matrix(x).float(), F.linear(x.float(), rounded), rtol=0.02, atol=0.05)


@pytest.mark.skipif(not multiplies_int8(), reason="no 8-bit dot products on this processor")
@torch.no_grad()
def test_int8_activations_are_rounded_to_a_255th_of_the_tokens_largest():
    """Within the worst that rounding can do, each token by itself, for a token of zeros too."""
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(5, 64) * torch.tensor([[1], [9], [0], [1e-3], [1]])
    dot, plain = _Int8Dot(weight, torch.float32), _Int8(weight)
    rounded = plain.weight.float() * dot.scales[:, None]
    worst = (x.abs().amax(1) / 254)[:, None] * rounded.abs().sum(1)
    assert ((dot(x) - x @ rounded.T).abs() <= worst + 1e-5).all()
    assert torch.equal(dot(x)[1:2], dot(x[1:2]))


@torch.no_grad()
def test_int4_is_its_rounded_matrix():
    """Each weight within half a step of its group, the product that of the rounded weights."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), torch.randn(3, 64).to(torch.bfloat16)
    matrix = _Int4(weight)
    columns = matrix(torch.eye(64).to(torch.bfloat16)).float().T
    groups = weight.unflatten(1, (-1, INT4_GROUP))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (columns - weight).unflatten(1, (-1, INT4_GROUP)).abs().amax(-1)
    assert (error <= 0.5 * step + 0.02).all()
    assert torch.allclose(matrix(x).float(), F.linear(x.float(), columns), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("weights", "most"), [("bfloat16", 0.02), ("int8", 0.05), ("int4", 0.4)])
@torch.no_grad()
def test_fewer_bits_stay_near_the_model(weights, most):
    exact = wide().logits(IDS)
    quantized = quantize(wide(), weights).logits(IDS)
    assert 0 < (quantized - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_cached_decoding_works_in_every_format(weights):
    engine = Engine(wide(), weights=weights)
    requests = [Request([1, 2, 3], 6, Sampling(temperature=0)), Request([5], 4)]
    assert [len(completion) for completion in engine.completions(requests)] == [6, 4]


@torch.no_grad()
def test_the_model_and_the_engine_do_not_disturb_each_other():
    model = wide()
    before = model.logits(IDS)
    engine = Engine(model)
    assert torch.equal(model.logits(IDS), before)
    request = Request([1, 2], 5, Sampling(temperature=0))
    completion = engine.completions([request])
    for block in model.blocks:
        block.project_out.down.neg_()
    assert engine.completions([request]) == completion
    assert not torch.equal(model.logits(IDS), before)
    engine.refresh(model)
    assert torch.allclose(engine.model.logits(IDS), model.logits(IDS), atol=1e-5)


def test_int4_says_which_matrix_does_not_fit():
    with pytest.raises(SettingsError, match="multiples of 16 x 32"):
        quantize(tiny(dim=24), "int4")


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_a_batch_changes_a_completion_only_where_two_tokens_are_equally_likely(weights):
    """In float32 never; with fewer bits from a step where the best two are within 0.02."""
    model, greedy = wide(), Sampling(temperature=0)
    with torch.no_grad():
        model.embedding *= 20
    requests = [Request([i, 2 * i, 5], 24, greedy, top_log_probs=2) for i in range(40)]
    together = [[] for _ in requests]
    for token in Engine(model, slots=16, weights=weights).generate(requests):
        together[token.request].append(token.id)
    alone, equal = Engine(model, slots=1, weights=weights), 0
    for request, ids in zip(requests, together, strict=True):
        tokens = list(alone.generate([request]))
        first = next((t for t, i in zip(tokens, ids, strict=True) if t.id != i), None)
        equal += first is None
        if first is not None:
            assert weights != "float32"
            assert first.top[0][1] - first.top[1][1] < 2e-2
    assert equal >= 20
