"""Context parallelism computes what one process computes, for every kind of batch and model.

Tolerances are relative, in float32: loss 2e-6, gradient norm 1e-5.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_runs import CONFIG, trainer_for
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from openpalm.data.batches.loader import IGNORE, Batch
from openpalm.model.attention import causal_attention
from openpalm.model.layout import packed_layout
from openpalm.model.transformer import Transformer, initialise
from openpalm.parallel import context
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.context import ContextSplit, context_split
from openpalm.parallel.world import join
from openpalm.train.config import MemorySettings
from openpalm.train.objective import NextToken
from openpalm.train.probes import held_out_sums
from ranks import on_ranks

STEPS = 2
SMALL = replace(CONFIG, depth=2)
LENGTH = SMALL.context


def few_targets_on_one_process(batch: Batch) -> Batch:
    """Nearly all targets of process 1 of 2, the middle of the rows, are not counted."""
    targets = batch.targets.clone()
    targets[:, LENGTH // 4 : LENGTH * 3 // 4] = IGNORE
    targets[0, LENGTH // 2] = 1
    return replace(batch, targets=targets)


def no_targets_on_one_process(batch: Batch) -> Batch:
    targets = batch.targets.clone()
    targets[:, LENGTH // 4 : LENGTH * 3 // 4] = IGNORE
    return replace(batch, targets=targets)


def narrow(batch: Batch) -> Batch:
    """A width that no number of chunks divides, as supervised examples may have."""
    return Batch(batch.inputs[:, :27], batch.targets[:, :27])


def documents(batch: Batch) -> Batch:
    """Documents of random lengths; the first row is one document."""
    generator = torch.Generator().manual_seed(int(batch.inputs.sum()))
    begins = torch.rand(batch.inputs.shape, generator=generator) < 0.2
    begins[0] = False
    return replace(batch, segments=begins.long().cumsum(dim=1))


def packed_with_padding(batch: Batch) -> Batch:
    found = narrow(documents(batch))
    segments = documents(batch).segments
    assert segments is not None
    return replace(found, segments=segments[:, :27])


CASES: dict[str, tuple[Callable[[Batch], Batch] | None, dict[str, Any]]] = {
    "few targets on one process": (few_targets_on_one_process, {}),
    "no targets on one process": (no_targets_on_one_process, {}),
    "narrow rows": (narrow, {}),
    "documents": (documents, {}),
    "packed with padding": (packed_with_padding, {"z_loss": 1e-3}),
    "grouped": (None, {"config": replace(SMALL, kv_heads=2)}),
    "multi-head with xPos": (None, {"config": replace(SMALL, kv_heads=4, xpos_base=64.0)}),
    "recompute full": (documents, {"memory": MemorySettings(recompute="full")}),
    "recompute selective": (None, {"memory": MemorySettings(recompute="selective")}),
}


class Edited:
    """A loader with each batch changed."""

    def __init__(self, loader: Any, edit: Callable[[Batch], Batch]):
        self.loader, self.edit = loader, edit

    def __next__(self) -> Batch:
        return self.edit(next(self.loader))


def reports(parallel: dict[str, Any], names: list[str]) -> dict[str, list[tuple]]:
    """Loss, gradient norm, count and metrics of each step, by case."""
    found = {}
    for name in names:
        edit, options = CASES[name]
        shape = {"config": SMALL, "steps": STEPS, "accumulation": 1}
        trainer = trainer_for(parallel, **shape | options)
        if edit is not None:
            trainer.loader = Edited(trainer.loader, edit)  # type: ignore[assignment]
        steps = [trainer.train_step() for _ in range(STEPS)]
        found[name] = [(r.loss, r.grad_norm, r.count, r.metrics) for r in steps]
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    return reports({}, list(CASES))


@pytest.mark.parametrize(
    ("size", "names"), [(2, list(CASES)), (4, ["narrow rows", "packed with padding"])]
)
def test_a_split_row_equals_one_process(size: int, names: list[str], alone: dict[str, list]):
    found = on_ranks(size, reports, {"context": size}, names)
    assert all(other == found[0] for other in found)
    for name, steps in found[0].items():
        for got, wanted in zip(steps, alone[name], strict=True):
            assert got[0] == pytest.approx(wanted[0], rel=2e-6), name
            assert got[1] == pytest.approx(wanted[1], rel=1e-5), name
            assert got[2] == wanted[2], name
            assert got[3] == pytest.approx(wanted[3], rel=1e-5), name


def test_every_target_counts_once(alone: dict[str, list]):
    """Neither the loss nor its count is multiplied by the number of processes (Megatron 673)."""
    counts = {name: [count for _, _, count, _ in steps] for name, steps in alone.items()}
    assert counts["grouped"] == [16 * LENGTH] * STEPS
    assert counts["no targets on one process"] == [16 * LENGTH // 2] * STEPS
    assert counts["few targets on one process"] == [16 * LENGTH // 2 + 1] * STEPS


def split_of(size: int) -> ContextSplit:
    split = context_split(join(ParallelSettings(context=size), torch.device("cpu")))
    assert split is not None
    return split


def sequences(dtype: torch.dtype, kv_heads: int, segments: bool) -> tuple[list[Tensor], Batch]:
    """Queries, keys, values and the gradient of the output; rows of 2,048 tokens."""
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (4, kv_heads, kv_heads, 4)
    tensors = [torch.randn(2, 2048, n, 8, generator=generator).to(dtype) for n in heads]
    ids = torch.zeros(2, 2048, dtype=torch.int64)
    ends = torch.rand(ids.shape, generator=generator) < torch.tensor([[0.01], [0.0005]])
    return tensors, Batch(ids, ids, ends.long().cumsum(dim=1) if segments else None)


SHAPES = [(1, False), (2, True), (4, False), (1, True)]


def attention_parts(size: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """This process's part of the outputs, and of the gradients of queries, keys and values."""
    split, found = split_of(size), []
    for kv_heads, segments in SHAPES:
        tensors, batch = sequences(dtype, kv_heads, segments)
        q, k, v, grad = (split._part(x) for x in tensors)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = split.layout(batch).attend(0, *inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    return found


def joined(parts: list[Tensor]) -> Tensor:
    """The whole of every process's two chunks, written out from the definition."""
    chunks: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        chunks[rank], chunks[2 * len(parts) - 1 - rank] = part.chunk(2, dim=1)
    return torch.cat([chunks[n] for n in sorted(chunks)], dim=1)


@pytest.mark.parametrize(
    ("size", "dtype", "close"), [(2, torch.float32, 6e-6), (4, torch.bfloat16, 0.03)]
)
def test_attention_and_its_gradients(size: int, dtype: torch.dtype, close: float):
    found = on_ranks(size, attention_parts, size, dtype)
    for n, (kv_heads, segments) in enumerate(SHAPES):
        (*inputs, grad), batch = sequences(dtype, kv_heads, segments)
        inputs = [x.float().requires_grad_() for x in inputs]
        if batch.segments is None:
            out = causal_attention(*inputs)
        else:
            out = packed_layout(batch.segments).attend(0, *inputs)
        wanted = [out.detach(), *torch.autograd.grad(out, inputs, grad.float())]
        for which, value in enumerate(wanted):
            got = joined([part[n][which] for part in found]).float()
            assert (got - value).abs().max() < close * max(1, value.abs().max())


def communicated(size: int, kv_heads: int, length: int) -> tuple[dict[str, int], list[int]]:
    """Calls by operation, and bytes that this process sends to each other one, in a step."""
    sent: list[int] = []
    gather, exchange = context.all_gather_single, dist.all_to_all_single

    def counted_gather(output: Tensor, x: Tensor, *args: Any) -> None:
        sent.append(x.numel() * x.itemsize)
        gather(output, x, *args)

    def counted_exchange(output: Tensor, x: Tensor, **group: Any) -> None:
        sent.append(x.numel() * x.itemsize // size)
        exchange(output, x, **group)

    model = Transformer(replace(SMALL, kv_heads=kv_heads, context=length))
    initialise(model, 0)
    ids = torch.zeros(2, length, dtype=torch.int64)
    objective = NextToken(context=split_of(size))
    context.all_gather_single, dist.all_to_all_single = counted_gather, counted_exchange
    try:
        with CommDebugMode() as mode, torch.autocast("cpu", torch.bfloat16):
            objective.loss(model, Batch(ids, ids))[0].backward()
    finally:
        context.all_gather_single, dist.all_to_all_single = gather, exchange
    return {str(name): calls for name, calls in mode.get_comm_counts().items()}, sent


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bytes_are_those_of_the_formula(kv_heads: int):
    """4 x head_dim bytes a token, layer and key head in each direction, and no other collective."""
    length, rows = 64, 2
    for calls, sent in on_ranks(2, communicated, 2, kv_heads, length):
        assert sorted(calls.values()) == [SMALL.depth, SMALL.depth], calls
        own_tokens = rows * length // 2
        assert sent == [4 * SMALL.head_dim * kv_heads * own_tokens] * 2 * SMALL.depth


def bf16_and_held_out(parallel: dict[str, Any]) -> tuple[list[float], list[float], float]:
    trainer = trainer_for(parallel, config=SMALL, steps=STEPS, dtype=torch.bfloat16)
    steps = [trainer.train_step() for _ in range(STEPS)]
    batches = [Batch(*(torch.arange(2 * 33).view(2, 33)[:, n : n + 32] for n in (0, 1)))]
    sums, count = held_out_sums(trainer.model, NextToken(), batches, torch.float32)
    assert count == 64
    return [step.loss for step in steps], [step.grad_norm for step in steps], sums["loss"]


def test_bfloat16_and_held_out_losses():
    losses, norms, held_out = bf16_and_held_out({})
    for found in on_ranks(2, bf16_and_held_out, {"context": 2}):
        assert found[0] == pytest.approx(losses, rel=1e-3)
        assert found[1] == pytest.approx(norms, rel=0.02)
        assert found[2] == pytest.approx(held_out, rel=1e-3)
