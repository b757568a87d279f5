"""Recomputing changes what is kept, and no number."""

import pytest
import torch
from torch import Tensor

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.model.config import ModelConfig
from openpalm.model.recompute import Recompute, recompute
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.objective import NextToken

CONFIG = ModelConfig(
    vocab_size=50, dim=32, depth=3, heads=4, head_dim=8, ff_dim=64, context=48, dropout=0.1
)


def gradient(what: Recompute, dtype: torch.dtype, segments: Tensor | None = None) -> Tensor:
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    recompute(model, what)
    ids = torch.randint(50, (2, 48), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, dims=1)
    targets[:, :5] = IGNORE
    torch.manual_seed(3)  # of dropout, which must fall the same way when computed again
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, _ = NextToken().loss(model.train(), Batch(ids, targets, segments))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["selective", "full", "offload"])
def test_the_gradient_is_the_same(what: Recompute, dtype: torch.dtype):
    assert torch.equal(gradient(what, dtype), gradient("none", dtype))


def test_with_sequences_sharing_rows():
    segments = torch.arange(48).div(20, rounding_mode="floor").expand(2, -1)
    whole = gradient("none", torch.float32, segments)
    assert torch.equal(gradient("full", torch.float32, segments), whole)
    assert not torch.equal(gradient("none", torch.float32), whole)


def saved_bytes(what: Recompute) -> int:
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    recompute(model, what)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        states = model.train().residual(torch.zeros(4, 48, dtype=torch.int64))
    del states
    return sum(kept.values())


def test_less_is_kept():
    assert saved_bytes("full") < saved_bytes("none") / 3


def test_offload_gives_up_only_the_inputs_of_blocks(monkeypatch: pytest.MonkeyPatch):
    """No weight is copied: what waits on the CPU has the size of a block's input."""
    given: list[tuple[int, ...]] = []

    class Recorded(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool):
            super().__init__(lambda x: given.append(tuple(x.shape)) or x, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    assert torch.equal(gradient("offload", torch.float32), gradient("none", torch.float32))
    assert given.count((2, 48, CONFIG.dim)) == CONFIG.depth
    weights = {tuple(p.shape) for p in Transformer(CONFIG).parameters()}
    assert not weights & set(given)
