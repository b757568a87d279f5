"""Every optimizer on sharded parameters is that optimizer on whole tensors.

DeepSpeed 8437 is Muon that orthogonalises parts of matrices, which is another optimizer;
accelerate 3971 is optimizer state that was saved but cannot be loaded.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from layout_runs import CONFIG, trainer_for, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from openpalm.model.sharding import whole
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.world import join
from openpalm.train.optimization import optimizers, parameter_groups
from openpalm.train.optimization.orthogonalise import orthogonalised
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimizer_settings import OptimSettings
from ranks import on_ranks

NAMES = ["adamw", "stable-adamw", "lion", "adafactor", "muon"]


# Runs of a model.

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
@pytest.mark.parametrize("optimizer", [name for name in NAMES if name != "lion"])
def test_a_sharded_run_equals_one_process(optimizer: str, layout: str):
    """Lion takes signs: a gradient of 1e-10 that rounds to the other side of zero moves a weight by
    two learning rates, so that runs part. The tests on given gradients below have it.
    """
    processes, parallel = LAYOUTS[layout]
    found = on_ranks(processes, run, parallel, optimizer)
    curve, trained = found[0]
    assert all(other[0] == curve for other in found)
    wanted_curve, wanted = alone(optimizer)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, wanted_curve, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
    for name, tensor in trained.items():
        close = 1e-6 if optimizer == "muon" and name.startswith("blocks.") else 3e-4
        assert distance(tensor, wanted[name]) < close, name


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Gradients given, parameters cut in every way.

SHAPES = {
    "blocks.even": (8, 6),
    "blocks.uneven": (7, 5),
    "blocks.wide": (3, 9),
    "blocks.one_row": (1, 4),
    "blocks.scale": (5,),
    "embedding": (11, 6),
}
ROWS, COLUMNS, COPY = Shard(0), Shard(1), Replicate()
FSDP_OF_TENSOR = _StridedShard(0, split_factor=2)
"""FSDP of rows that tensor parallelism has cut before."""
CUTS: dict[str, dict[str, Any]] = {
    "rows": dict.fromkeys(SHAPES, (ROWS, COPY)),
    "copies": dict.fromkeys(SHAPES, (COPY, COPY)),
    "mixed": {
        "blocks.even": (FSDP_OF_TENSOR, ROWS),
        "blocks.uneven": (ROWS, COLUMNS),
        "blocks.wide": (COPY, COLUMNS),
        "blocks.one_row": (ROWS, COPY),
        "blocks.scale": (ROWS, COPY),
        "embedding": (ROWS, ROWS),
    },
}
STEPS = 4


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def cut(value: Tensor, mesh: DeviceMesh | None, placements: Any) -> Tensor:
    """The value, the same on every process, sharded so; not at all without a mesh."""
    if mesh is None:
        return value
    if placements != (FSDP_OF_TENSOR, ROWS):
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    part = value.chunk(2)[coordinate[1]].chunk(2)[coordinate[0]]
    return DTensor.from_local(part, mesh, placements, shape=value.shape, stride=value.stride())


class Given(nn.Module):
    """Parameters cut in one of the ways, and gradients drawn for them."""

    def __init__(self, mesh: DeviceMesh | None, placements: dict[str, Any]):
        super().__init__()
        self.mesh, self.placements = mesh, placements
        self.blocks = nn.ParameterDict()
        for name, value in values(0).items():
            owner = self.blocks if name.startswith("blocks.") else self
            made = nn.Parameter(cut(value, mesh, placements[name]))
            owner.register_parameter(name.removeprefix("blocks."), made)

    def give_gradients(self, seed: int) -> None:
        for (name, parameter), value in zip(
            self.named_parameters(), self.in_order(values(seed)), strict=True
        ):
            where = self.placements[name]
            parameter.grad = cut(value, self.mesh, where)
            if self.mesh is not None and where[1] == COPY:  # as tensor parallelism leaves it
                half = cut(value / 2, self.mesh, where).to_local()  # type: ignore[attr-defined]
                sums = (where[0], Partial())
                parameter.grad = DTensor.from_local(
                    half, self.mesh, sums, shape=value.shape, stride=value.stride()
                )

    def in_order(self, by_name: dict[str, Tensor]) -> list[Tensor]:
        return [by_name[name] for name, _ in self.named_parameters()]


def step(model: Given, optimizer: Optimizer, seed: int) -> float:
    model.give_gradients(seed)
    norm = optimizer.clip()
    optimizer.step(1.0)
    return norm


def made(name: str, mesh: DeviceMesh | None, cuts: str) -> tuple[Given, Optimizer]:
    model = Given(mesh, CUTS[cuts])
    return model, Optimizer(model, OptimSettings(name=name, clip=3.0), 0.03)  # type: ignore[arg-type]


def trained(name: str, mesh: DeviceMesh | None, cuts: str) -> tuple[list[float], dict[str, Tensor]]:
    model, optimizer = made(name, mesh, cuts)
    norms = [step(model, optimizer, seed) for seed in range(1, STEPS + 1)]
    return norms, {n: whole(p).detach() for n, p in model.named_parameters()}


def mesh_2x2() -> DeviceMesh:
    muon_in_float32()
    mesh = join(ParallelSettings(shard=2, tensor=2), torch.device("cpu")).mesh
    assert mesh is not None
    return mesh["shard", "tensor"]


def apart_2x2() -> dict[tuple[str, str], float]:
    """For each optimizer and cut, the largest relative difference of a norm or parameter."""
    found, mesh = {}, mesh_2x2()
    for name in NAMES:
        for cuts in CUTS:
            norms, parameters = trained(name, mesh, cuts)
            # The same gradients on whole tensors; this process alone takes their norm.
            wanted_norms, wanted = expected(name)
            apart = [abs(a / b - 1) for a, b in zip(norms, wanted_norms, strict=True)]
            apart += [distance(parameters[n], wanted[n]) for n in wanted]
            found[name, cuts] = max(apart)
    return found


def expected(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same run on whole tensors, clipped by torch."""
    model, optimizer = made(name, None, "copies")
    norms = []
    for seed in range(1, STEPS + 1):
        model.give_gradients(seed)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 3.0)))
        optimizer.step(1.0)
    return norms, {n: p.detach() for n, p in model.named_parameters()}


def test_every_cut_of_the_parameters_gives_the_same_step():
    for process in on_ranks(4, apart_2x2):
        assert {key: apart for key, apart in process.items() if not apart < 2e-6} == {}


def orthogonalised_by_parts() -> dict[str, Any]:
    """What Muon would be on parts, and how many matrices this process orthogonalises."""
    mesh, calls = mesh_2x2(), []
    _, wanted = expected("muon")
    together = optimizers.orthogonalised_parts
    module = __import__(orthogonalised.__module__, fromlist=["orthogonalised"])
    module.orthogonalised = lambda x: calls.append(x.shape) or orthogonalised(x)
    trained("muon", mesh, "rows")
    module.orthogonalised = orthogonalised
    optimizers.orthogonalised_parts = lambda parts, owners: [orthogonalised(p) for p in parts]
    _, parts = trained("muon", mesh, "rows")
    optimizers.orthogonalised_parts = together
    return {"calls": len(calls), "apart": distance(parts["blocks.even"], wanted["blocks.even"])}


def test_each_process_orthogonalises_a_share_of_whole_matrices():
    found = on_ranks(4, orthogonalised_by_parts)
    matrices = sum(len(s) == 2 and n.startswith("blocks.") for n, s in SHAPES.items())
    assert sum(process["calls"] for process in found) == STEPS * matrices
    assert max(process["calls"] for process in found) == STEPS * math.ceil(matrices / 4)
    assert min(process["apart"] for process in found) > 1e-3  # else the tests above prove nothing


# State.


def reloaded_2x2() -> dict[str, Any]:
    """Optimizers restored from states cut in other ways; their differences from a whole one."""
    mesh, found = mesh_2x2(), {}
    for name in NAMES:
        _, wanted = expected(name)
        first_model, first = made(name, mesh, "rows")
        for seed in (1, 2):
            step(first_model, first, seed)
        state = first.state_tensors()
        sharded = [k for k, v in state.items() if isinstance(v, DTensor)]
        shapes = {k: v.shape for k, v in state.items() if not k.endswith("/step")}
        assert shapes == {k: SHAPES[k.rsplit("/", 1)[0]] for k in sharded}
        for form, given in (
            ("whole", {k: whole(v).clone() for k, v in state.items()}),
            ("otherwise cut", {k: v.clone() for k, v in state.items()}),
        ):
            model, second = made(name, mesh, "mixed")
            with torch.no_grad():
                for n, p in model.named_parameters():
                    value = whole(dict(first_model.named_parameters())[n])
                    p.copy_(cut(value, mesh, CUTS["mixed"][n]))
            names = {n for n, _ in model.named_parameters()}
            assert second.take_over(given, names) == []
            for seed in (3, 4):
                step(model, second, seed)
            parameters = {n: whole(p).detach() for n, p in model.named_parameters()}
            found[name, form] = max(distance(parameters[n], wanted[n]) for n in wanted)
    return found


def test_state_is_loaded_into_another_cut():
    for process in on_ranks(4, reloaded_2x2):
        assert {key: apart for key, apart in process.items() if not apart < 2e-6} == {}


# Pipeline stages.


def norm_of_two_stages() -> float:
    """Two stages with a parameter each and a copy of a table that the second does not count."""
    stage = join(ParallelSettings(pipeline=2), torch.device("cpu")).rank
    model = nn.ParameterDict({"table": nn.Parameter(torch.zeros(3)), "own": torch.zeros(2)})
    optimizer = Optimizer(model, OptimSettings(), 1e-3)
    optimizer.uncounted = [model["table"]] if stage else []
    model["table"].grad = torch.full((3,), 2.0)
    model["own"].grad = torch.full((2,), 1.0 + stage)
    return optimizer.clip()


def test_the_norm_is_over_all_stages_and_counts_a_tied_table_once():
    norm = math.sqrt(3 * 4 + 2 * 1 + 2 * 4)
    assert on_ranks(2, norm_of_two_stages) == pytest.approx([norm, norm], rel=1e-6)


# float16.


def float16_steps(parallel: dict[str, Any]) -> list[tuple[float, str | None, float]]:
    """Losses of five steps, of which the second begins with a loss scale that is too large."""
    trainer = trainer_for(parallel, dtype=torch.float16, sequences=12)
    assert trainer.loss_scale is not None
    found = []
    for number in range(5):
        if number == 1:
            trainer.loss_scale.scale = 2.0**60
        report = trainer.train_step()
        found.append((report.loss, report.skipped, report.metrics["loss_scale"]))
        if number == 1:
            trainer.loss_scale.scale = 2.0**16
    return found


def test_float16_on_shards_skips_the_same_steps_everywhere():
    found = on_ranks(2, float16_steps, {})
    assert found[0] == found[1]
    for (loss, skipped, scale), wanted in zip(found[0], alone_in_float16(), strict=True):
        assert loss == pytest.approx(wanted[0], rel=1e-3)
        assert (skipped, scale) == wanted[1:]
    assert [skipped is not None for _, skipped, _ in found[0]] == [False, True, False, False, False]


def alone_in_float16() -> list[tuple[float, str | None, float]]:
    return on_ranks(1, float16_steps, {})[0]


# Gradient noise scale.


NOISY_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp-2": (2, {}),
    "hsdp-2x2": (4, {"shard": 2, "replicate": 2}),
    "context-2": (2, {"context": 2}),
    "tensor-2": (2, {"tensor": 2}),
    "tensor-2-context-2": (4, {"tensor": 2, "context": 2}),
    "pipeline-2": (2, {"pipeline": 2}),
    "pipeline-2-gpipe": (2, {"pipeline": 2, "schedule": "gpipe"}),
    "pipeline-4": (4, {"pipeline": 4}),
    "interleaved-2-shard-2": (4, {"pipeline": 2, "schedule": "interleaved", "shard": 2}),
    "pipeline-2-tensor-2": (4, {"pipeline": 2, "tensor": 2}),
    "pipeline-2-replicas-2": (4, {"pipeline": 2, "shard": 1}),
}


def noise(parallel: dict[str, Any]) -> list[list[tuple[float, dict[str, float]]]]:
    """Gradient norm and metrics of three steps of four microbatches, by model."""
    found = []
    for config in (CONFIG, replace(CONFIG, tied=False)):
        trainer = trainer_for(parallel, config=config, noise_scale=True, accumulation=4)
        steps = [trainer.train_step() for _ in range(3)]
        found.append([(step.grad_norm, step.metrics) for step in steps])
    return found


@cache
def noise_alone() -> list[list[tuple[float, dict[str, float]]]]:
    return on_ranks(1, noise, {})[0]


@pytest.mark.parametrize("layout", NOISY_LAYOUTS)
def test_the_noise_scale_is_that_of_one_process(layout: str):
    """A microbatch of all processes is one microbatch of one process."""
    processes, parallel = NOISY_LAYOUTS[layout]
    for found in on_ranks(processes, noise, parallel):
        for steps, alone in zip(found, noise_alone(), strict=True):
            for (norm, metrics), (wanted_norm, wanted) in zip(steps, alone, strict=True):
                assert {"noise/g", "noise/s", "last_loss"} <= wanted.keys()
                assert norm == pytest.approx(wanted_norm, rel=1e-5)
                assert metrics == pytest.approx(wanted, rel=1e-4)
