"""Every optimizer on sharded parameters is that optimizer on whole tensors.

DeepSpeed 8437 is Muon that orthogonalises parts of matrices, which is another optimizer;
accelerate 3971 is optimizer state that was saved but cannot be loaded.
"""

from functools import cache
from typing import Any

import pytest
from layout_runs import trainer_for, weights

from openpalm.train.optimization import parameter_groups
from ranks import on_ranks

NAMES = ["adamw", "stable-adamw", "lion", "adafactor", "muon"]
LAYOUTS = {
    "fsdp-2": (2, {}),
    "fsdp-3": (3, {}),
    "hsdp-2x2": (4, {"shard": 2, "replicate": 2}),
}


def muon_in_float32() -> None:
    parameter_groups.multiplies_bfloat16 = lambda device: False  # type: ignore[assignment]


def run(parallel: dict[str, Any], optimizer: str) -> tuple[list[tuple[float, float]], Any]:
    """Loss and gradient norm of each of ten steps, and the weights after them."""
    muon_in_float32()
    trainer = trainer_for(parallel, optimizer=optimizer, sequences=12)
    reports = [trainer.train_step() for _ in range(trainer.steps)]
    return [(report.loss, report.grad_norm) for report in reports], weights(trainer)


@cache
def alone(optimizer: str) -> Any:
    return on_ranks(1, run, {}, optimizer)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", NAMES)
def test_a_sharded_run_equals_one_process(optimizer: str, layout: str):
    processes, parallel = LAYOUTS[layout]
    found = on_ranks(processes, run, parallel, optimizer)
    curve, trained = found[0]
    assert all(other[0] == curve for other in found)
    wanted_curve, wanted = alone(optimizer)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, wanted_curve, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
    print({n: float((t - wanted[n]).norm() / wanted[n].norm()) for n, t in trained.items()})
    for name, tensor in trained.items():
        close = 1e-6 if optimizer == "muon" and name.startswith("blocks.") else 1e-4
        assert (tensor - wanted[name]).norm() < close * wanted[name].norm(), name
