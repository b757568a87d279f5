"""The chunked loss of a linear head against torch's own, and against the z-loss written out."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openpalm.model import cross_entropy
from openpalm.model.cross_entropy import linear_cross_entropy

Z = 0.05


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [11, 6], table [17, 6], bias [17] with large logits among them, and targets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(11, 6), (17, 6), (17,)]
    states, table, bias = (
        torch.randn(shape, generator=generator, dtype=dtype).mul_(3).requires_grad_()
        for shape in shapes
    )
    return states, table, bias, torch.randint(17, (11,), generator=generator)


def written_out(
    states: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float
) -> Tensor:
    """The loss whose gradient is wanted, by torch, whole."""
    logits = F.linear(states, table, bias)
    log_z = logits.logsumexp(-1)
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * log_z.square().sum()


def check(loss: Callable[..., tuple[Tensor, Tensor]], *, biased: bool, z_loss: float) -> None:
    """Value and every gradient of `loss` agree with what is written out."""
    states, table, bias, targets = draw()
    given = (states, table, bias) if biased else (states, table, None)
    whole = written_out(*given, targets, z_loss)
    wanted = torch.autograd.grad(whole, [x for x in given if x is not None])
    nll, z = loss(*given, targets, z_loss=z_loss)
    assert abs(nll + z - whole) < 1e-9
    assert abs(nll - F.cross_entropy(F.linear(*given), targets, reduction="sum")) < 1e-9
    found = torch.autograd.grad(3 * nll, [x for x in given if x is not None])
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - 3 * theirs).abs().max() < 1e-9


@pytest.mark.parametrize("z_loss", [0.0, Z])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100, None])
def test_equals_torch(chunk: int | None, biased: bool, z_loss: float):
    def loss(*given: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(*given, z_loss=z_loss, chunk=chunk)

    check(loss, biased=biased, z_loss=z_loss)


def test_a_forgotten_z_loss_or_last_chunk_is_noticed():
    def without_z(*given: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        nll, _ = linear_cross_entropy(*given)
        return nll, linear_cross_entropy(*given, z_loss=z_loss)[1]

    def without_last(
        states: Tensor, table: Tensor, bias: Tensor, targets: Tensor, *, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(states[:8], table, bias, targets[:8], z_loss=z_loss)

    for wrong in (without_z, without_last):
        with pytest.raises(AssertionError):
            check(wrong, biased=True, z_loss=Z)


def test_finite_differences():
    *given, targets = draw()
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(*x, targets, chunk=4)[0], tuple(given)
    )


def test_huge_logits_stay_finite():
    states, table, bias, targets = draw(torch.float32)
    nll, z = linear_cross_entropy(states * 1e4, table, bias, targets, z_loss=1e-4)
    nll.backward()
    assert nll.isfinite()
    assert z.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (states, table, bias))


def test_bfloat16_is_torch_under_autocast():
    states, table, _, targets = draw(torch.float32)
    grads = []
    for mine in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if mine:
                loss, _ = linear_cross_entropy(states, table, None, targets, chunk=4)
            else:
                loss = F.cross_entropy(F.linear(states, table).float(), targets, reduction="sum")
        grads.append((loss.detach(), *torch.autograd.grad(loss, [states, table])))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_frozen_table_gets_no_gradient():
    states, table, _, targets = draw()
    linear_cross_entropy(states, table.detach(), None, targets)[0].backward()
    assert states.grad is not None


def test_chunks_follow_the_memory_allowed(monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    pieces = cross_entropy.pieces
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 8 * 4 * 17)  # four rows of float64

    def watched(x: Tensor) -> Iterator[slice]:
        rows.append(len(x))
        return pieces(x)

    monkeypatch.setattr(cross_entropy, "pieces", watched)
    states, table, bias, targets = draw()
    linear_cross_entropy(states, table, bias, targets)
    assert rows == [4, 4, 3]


@pytest.mark.parametrize("size", [1, 4 * 17, 2 * 4 * 17, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pieces_of_any_size_give_the_same(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
):
    states, table, bias, targets = draw(torch.float64 if dtype == torch.float64 else torch.float32)

    def found() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            nll, z = linear_cross_entropy(states, table, bias, targets, z_loss=Z, chunk=4)
        return [nll, z, *torch.autograd.grad(nll, [states, table, bias])]

    whole = found()
    monkeypatch.setattr(cross_entropy, "_PIECE_BYTES", size)
    for ours, theirs in zip(found(), whole, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
