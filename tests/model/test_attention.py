"""The attention kernels agree with each other, and their gradients with finite differences."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from openpalm.model.attention import (
    BLOCK,
    _sdpa,
    blocked_causal,
    causal_attention,
    masked_attention,
)


def draw(time: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, time, heads, 8), (2, time, kv_heads, 8), (2, time, kv_heads, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v with heads repeated; mask [batch, time, keys]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 5, BLOCK, BLOCK + 3, 2 * BLOCK + 1])
def test_causal_kernels_agree(time: int, kv_heads: int):
    q, k, v = draw(time, 4, kv_heads)
    causal = torch.ones(time, time).tril().bool().expand(2, -1, -1)
    expected = plain(q, k, v, causal)
    assert (causal_attention(q, k, v) - expected).abs().max() < 1e-5
    assert (blocked_causal(q, k, v) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "time"), [(1, 6), (5, 9), (BLOCK + 3, 2 * BLOCK)])
def test_earlier_keys_are_visible_to_all_queries(queries: int, time: int, kv_heads: int):
    q, k, v = draw(time, 4, kv_heads)
    whole = plain(q, k, v, torch.ones(time, time).tril().bool().expand(2, -1, -1))
    last = slice(time - queries, None)
    assert (causal_attention(q[:, last], k, v) - whole[:, last]).abs().max() < 1e-5
    # What a GPU runs: no mask is made there, but the alignment is the same.
    aligned = _sdpa(q[:, last], k, v, attn_mask=causal_lower_right(queries, time))
    assert (aligned - whole[:, last]).abs().max() < 1e-5


@pytest.mark.parametrize("kept", [True, False])
def test_gradients_with_earlier_keys(monkeypatch: pytest.MonkeyPatch, kept: bool):
    monkeypatch.setattr("openpalm.model.attention.KEPT", 6 if kept else 4)
    inputs = [x[:, :, :, :4].requires_grad_() for x in draw(7, 2, 1, torch.float64)]
    inputs[0] = inputs[0].detach()[:, 4:].requires_grad_()
    assert torch.autograd.gradcheck(causal_attention, inputs)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bfloat16_is_float32_within_its_precision(kv_heads: int):
    time = BLOCK + 40
    q, k, v = draw(time, 4, kv_heads, torch.bfloat16)
    rough = causal_attention(q, k, v)
    exact = causal_attention(q.float(), k.float(), v.float())
    assert rough.dtype == torch.bfloat16
    # 8 bits of mantissa in scores, weights and sums: a few steps of 2^-8 of the largest value.
    assert (rough.float() - exact).abs().max() < 4 * 2**-8 * v.float().abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 6])
def test_masked_attention_agrees(queries: int, kv_heads: int):
    q, k, v = draw(9, 4, kv_heads)
    q = q[:, :queries]
    mask = torch.rand(2, queries, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    expected = plain(q, k, v, mask)
    assert (masked_attention(q, k, v, mask) - expected).abs().max() < 1e-5
    everywhere = torch.ones_like(mask)
    got = masked_attention(q, k, v, None)
    assert (got - plain(q, k, v, everywhere)).abs().max() < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kernel", ["blocked", "masked", "one query"])
def test_gradients(kernel: str, kv_heads: int):
    q, k, v = (x[:, :4, :, :4].requires_grad_() for x in draw(4, 2, kv_heads, torch.float64))
    mask = torch.ones(1, 4, 4).tril().bool()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel == "blocked":
            return blocked_causal(q, k, v)
        if kernel == "masked":
            return masked_attention(q, k, v, mask)
        return masked_attention(q[:, -1:], k, v, mask[:, -1:])

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("kept", [0, 1024])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_blocked_gradients_under_a_mask(monkeypatch: pytest.MonkeyPatch, kv_heads: int, kept: int):
    """Earlier keys and a row's own mask, with the weights kept and computed again."""
    monkeypatch.setattr("openpalm.model.attention.BLOCK", 2)
    monkeypatch.setattr("openpalm.model.attention.KEPT", kept)
    q, k, v = (x[..., :4] for x in draw(5, 2, kv_heads, torch.float64))
    q = q[:, 2:]
    mask = torch.ones(2, 3, 5).tril(2).bool()
    mask[1, :, 1] = False

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blocked_causal(q, k, v, mask)

    assert (run(q, k, v) - plain(q, k, v, mask)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(run, tuple(x.clone().requires_grad_() for x in (q, k, v)))


def test_blocked_gradients_across_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("openpalm.model.attention.BLOCK", 2)
    q, k, v = (x[..., :4].requires_grad_() for x in draw(5, 2, 1, torch.float64))
    assert torch.autograd.gradcheck(blocked_causal, (q, k, v))
