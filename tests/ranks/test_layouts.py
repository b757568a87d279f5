"""Every layout of processes computes what one process computes.

Tolerances are relative, the largest over ten steps, in float32: loss 2e-6, gradient norm 1e-5.
"""

from functools import cache
from typing import Any

import pytest
from layout_runs import curve

from ranks import on_ranks

LAYOUTS = {
    "fsdp-2": (2, {}),
    "fsdp-4": (4, {}),
    "fsdp-3": (2, {"reshard": False}),
    "replicas-2": (2, {"shard": 1}),
    "hsdp-2x2": (4, {"shard": 2, "replicate": 2}),
    "context-2": (2, {"context": 2}),
    "context-4": (4, {"context": 4}),
    "context-2-shard-2": (4, {"context": 2, "shard": 2}),
    "context-2-replicas-2": (4, {"context": 2, "shard": 1, "replicate": 2}),
}


@cache
def alone(optimizer: str) -> list[tuple[float, float]]:
    return curve(optimizer=optimizer)


def layout_curve(parallel: dict[str, Any], optimizer: str) -> list[tuple[float, float]]:
    return curve(parallel, optimizer=optimizer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_equals_one_process(name: str):
    processes, parallel = LAYOUTS[name]
    found = on_ranks(processes, layout_curve, parallel, "adamw")
    assert all(other == found[0] for other in found)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0], alone("adamw"), strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
