"""Every layout of processes computes what one process computes.

Tolerances are relative, the largest over ten steps, in float32: loss 2e-6, gradient norm 1e-5.
"""

from functools import cache
from typing import Any

import pytest
from layout_runs import curve

from openpalm.train.optimization import parameter_groups
from ranks import on_ranks

LAYOUTS = {
    "fsdp-2": (2, {}),
    "fsdp-4": (4, {}),
    "fsdp-3": (2, {"reshard": False}),
    "replicas-2": (2, {"shard": 1}),
    "tensor-2": (2, {"tensor": 2, "sequence": False}),
    "tensor-2-sequence": (2, {"tensor": 2}),
    "tensor-2-context-2": (4, {"tensor": 2, "context": 2}),
    "tensor-2-pipeline-2": (4, {"tensor": 2, "pipeline": 2}),
    "hsdp-2x2": (4, {"shard": 2, "replicate": 2}),
    "context-2": (2, {"context": 2}),
    "context-4": (4, {"context": 4}),
    "context-2-shard-2": (4, {"context": 2, "shard": 2}),
    "context-2-replicas-2": (4, {"context": 2, "shard": 1, "replicate": 2}),
}


@cache
def alone(optimizer: str) -> list[tuple[float, float]]:
    return on_ranks(1, layout_curve, {}, optimizer)[0]


def layout_curve(parallel: dict[str, Any], optimizer: str) -> list[tuple[float, float]]:
    # In bfloat16 Muon's iteration may round equal gradients apart.
    parameter_groups.multiplies_bfloat16 = lambda device: False  # type: ignore[assignment]
    return curve(parallel, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(name: str, optimizer: str):
    processes, parallel = LAYOUTS[name]
    found = on_ranks(processes, layout_curve, parallel, optimizer)
    assert all(other == found[0] for other in found)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0], alone(optimizer), strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
