"""The plan's bytes against those that two processes hold at the peak of a step.

tests/plan/test_memory.py does the same on one process.
"""

from typing import Any

import pytest
import torch
from layout_runs import trainer_for
from live_tensors import LiveTensors

from openpalm.model.config import ModelConfig
from openpalm.model.sharding import local_part
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import step_memory
from openpalm.plan.training import Training
from openpalm.train.config import MemorySettings
from ranks import on_ranks

PALM = ModelConfig(vocab_size=1000, dim=96, depth=4, heads=4, head_dim=32, ff_dim=384, context=128)
Case = tuple[dict[str, Any], str, str, int]
"""layout, dtype, recomputation, microbatches"""
CASES: dict[str, Case] = {
    "fsdp": ({}, "float32", "none", 2),
    "fsdp, bfloat16": ({}, "bfloat16", "none", 2),
    "fsdp, bfloat16, full": ({}, "bfloat16", "full", 4),
    "zero-2": ({"reshard": False}, "float32", "full", 2),
    "replicas": ({"shard": 1}, "float32", "none", 2),
    "tensor": ({"tensor": 2}, "float32", "none", 2),
    "tensor, bfloat16, full": ({"tensor": 2}, "bfloat16", "full", 2),
    "context": ({"context": 2}, "float32", "none", 2),
    "context, bfloat16": ({"context": 2}, "bfloat16", "none", 2),
    "pipeline": ({"pipeline": 2}, "float32", "none", 2),
    "pipeline, bfloat16, full": ({"pipeline": 2}, "bfloat16", "full", 4),
}
SEQUENCES = 8
"""of a microbatch of both processes"""


def measured(case: Case) -> tuple[int, int, int, tuple[int, ...]]:
    """Bytes of this process: at the peak of its second step, of its weights, of its moments."""
    parallel, dtype, recompute, microbatches = case
    trainer = trainer_for(
        parallel,
        config=PALM,
        accumulation=microbatches,
        sequences=SEQUENCES * microbatches,
        dtype=getattr(torch, dtype),
        memory=MemorySettings(recompute=recompute),  # type: ignore[arg-type]
    )
    live = LiveTensors()
    for parameter in trainer.model.parameters():
        live.add(parameter)
    for _ in range(2):
        live.peak = 0
        with live:
            trainer.train_step()
    moments = [local_part(x).nbytes for x in trainer.optimizer.state_tensors().values() if x.dim()]
    weights = sum(local_part(parameter).nbytes for parameter in trainer.model.parameters())
    return live.peak, weights, sum(moments), trainer.world.axes.sizes


@pytest.mark.parametrize("name", CASES)
def test_memory_of_two_processes_within_five_per_cent(name: str):
    _, dtype, recompute, microbatches = CASES[name]
    found = on_ranks(2, measured, CASES[name])
    peak, weights, moments = (max(process[n] for process in found) for n in range(3))
    layout = Layout(*found[0][3])
    training = Training(
        PALM,
        PALM.context,
        SEQUENCES // layout.data,
        microbatches,
        dtype=dtype,  # type: ignore[arg-type]
        recompute=recompute,  # type: ignore[arg-type]
        reshard=CASES[name][0].get("reshard", True),
    )
    planned = step_memory(training, layout, cuda=False)
    assert planned.total == pytest.approx(peak, rel=0.05)
    assert planned.weights == pytest.approx(weights, rel=0.005)
    assert planned.moments == pytest.approx(moments, rel=0.005)
