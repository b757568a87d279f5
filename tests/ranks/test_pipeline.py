"""A pipeline of processes computes what one process computes, with every schedule.

Tolerances are relative, the largest over ten steps, in float32: loss 2e-6, gradient norm 1e-5.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from layout_runs import CONFIG, STEPS, tokens, trainer_for, weights
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import tensors
from openpalm.checkpoint.contents import TrainState, collect
from openpalm.checkpoint.saver import Saver
from openpalm.data.batches.loader import evaluation_batches
from openpalm.model.transformer import Transformer
from openpalm.parallel.stages import counted_once
from openpalm.train.config import MemorySettings
from openpalm.train.objective import NextToken
from openpalm.train.probes import held_out_sums
from ranks import on_ranks

UNTIED = {"config": replace(CONFIG, tied=False, bias=True, embedding_bias=True)}
UNEVEN = {"config": replace(CONFIG, depth=6)}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "gpipe": (2, {"schedule": "gpipe"}, {}),
    "1f1b": (2, {}, {"z_loss": 1e-3}),
    "interleaved": (2, {"schedule": "interleaved"}, {}),
    "untied": (2, {}, UNTIED),
    "untied-interleaved": (2, {"schedule": "interleaved"}, UNTIED),
    "recompute": (2, {}, {"memory": MemorySettings(recompute="full")}),
    "document-mask": (2, {"schedule": "interleaved"}, {"document_mask": True}),
    "ramp": (2, {}, {"batch_ramp": "1/2@0.5"}),
    "uneven-4": (4, {"pipeline": 4}, UNEVEN),
    "fsdp": (4, {"shard": 2}, {}),
    "fsdp-interleaved-recompute": (
        4,
        {"shard": 2, "schedule": "interleaved"},
        {"memory": MemorySettings(recompute="full")},
    ),
    "context-interleaved": (4, {"context": 2, "schedule": "interleaved"}, {"document_mask": True}),
    "tensor": (4, {"tensor": 2}, {"document_mask": True}),
    "tensor-untied-interleaved": (
        4,
        {"tensor": 2, "sequence": False, "schedule": "interleaved"},
        UNTIED,
    ),
    "muon": (2, {}, {"optimizer": "muon"}),
    "replicas": (4, {"shard": 1, "replicate": 2}, {}),
}


Run = tuple[list[tuple[float, float, dict[str, float]]], dict[str, Tensor], list[str]]
"""loss, gradient norm and metrics of each step; weights; parameters that are counted here"""


def run(parallel: dict[str, Any] | None, options: dict[str, Any]) -> Run:
    trainer = trainer_for(parallel, accumulation=4, **options)
    steps = []
    for _ in range(trainer.steps):
        report = trainer.train_step()
        steps.append((report.loss, report.grad_norm, report.metrics))
    names = [name for name, _ in trainer.model.named_parameters()]
    counted = [name for name in names if counted_once(trainer.model, name)]
    return steps, weights(trainer), counted


@cache
def alone(case: str) -> Run:
    return run(None, CASES[case][2])


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_equals_one_process(case: str):
    processes, parallel, options = CASES[case]
    found = on_ranks(processes, run, {"pipeline": 2} | parallel, options)
    wanted_steps, wanted, _ = alone(case)
    for steps, values, _ in found:
        assert len(steps) == STEPS
        for (loss, norm, metrics), expected in zip(steps, wanted_steps, strict=True):
            assert loss == pytest.approx(expected[0], rel=2e-6)
            assert norm == pytest.approx(expected[1], rel=1e-5)
            assert metrics == pytest.approx(expected[2], rel=1e-5)
        for name, value in values.items():
            # AdamW turns a rounding error of a tiny gradient into a part of a step of 3e-3.
            close = 1e-4 if "tensor" in parallel else 1e-5
            torch.testing.assert_close(value, wanted[name], rtol=close, atol=close)
    # Each parameter is counted on one stage; copies on several processes are shards or replicas.
    copies = processes // ({"pipeline": 2} | parallel)["pipeline"]
    counted = sorted(name for _, _, names in found for name in names)
    assert counted == sorted([*wanted] * copies)
    # Both copies of a tied table stay equal to the last bit.
    tables = [values["embedding"] for _, values, _ in found if "embedding" in values]
    assert all(torch.equal(table, tables[0]) for table in tables)


def test_the_document_mask_matters():
    masked, unmasked = alone("document-mask")[0], alone("1f1b")[0]
    assert masked[0][0] != unmasked[0][0]


def evaluated(parallel: dict[str, Any] | None) -> tuple[dict[str, float], int, Tensor]:
    """Sums over held-out text between two training steps, and logits after them."""
    trainer = trainer_for(parallel, accumulation=4)
    trainer.train_step()
    # The last batch has fewer rows and the last row fewer targets.
    text = tokens().numpy()[:1000]
    batches = evaluation_batches(text, sequence_length=CONFIG.context, rows=4)
    sums, count = held_out_sums(trainer.model, NextToken(1e-3), batches, torch.float32)
    trainer.train_step()
    with torch.no_grad():
        logits = trainer.model(Transformer.logits, tokens()[None, : CONFIG.context])
    return sums, count, logits


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(2, {"schedule": "interleaved"}), (4, {"shard": 2})],
)
def test_evaluation_goes_through_the_stages(processes: int, parallel: dict[str, Any]):
    sums, count, logits = evaluated(None)
    for found in on_ranks(processes, evaluated, {"pipeline": 2} | parallel):
        assert found[0] == pytest.approx(sums, rel=1e-5)
        assert found[1] == count
        torch.testing.assert_close(found[2], logits, rtol=1e-4, atol=1e-5)


def losses(parallel: dict[str, Any] | None, dtype: torch.dtype) -> list[float]:
    trainer = trainer_for(parallel, accumulation=4, dtype=dtype)
    return [trainer.train_step().loss for _ in range(trainer.steps)]


@pytest.mark.parametrize(("processes", "rel"), [(2, 2e-6), (4, 1e-2)])
def test_a_pipeline_in_bfloat16(processes: int, rel: float):
    # With a shard axis the residual stream is in bfloat16 too, between the stages as within them.
    wanted = losses(None, torch.bfloat16)
    assert wanted != losses(None, torch.float32)
    for found in on_ranks(processes, losses, {"pipeline": 2}, torch.bfloat16):
        assert found == pytest.approx(wanted, rel=rel)


def saved(parallel: dict[str, Any] | None, folder: Path) -> list[float]:
    """Losses of the steps after the checkpoint that it saves."""
    trainer = trainer_for(parallel, accumulation=4)
    for _ in range(3):
        trainer.train_step()
    contents = collect(trainer.model, train=TrainState(*trainer.state()), with_fingerprint=True)
    saver = Saver(trainer.world)
    saver.save(folder, contents, {})
    saver.wait()
    return [trainer.train_step().loss for _ in range(3)]


def resumed(parallel: dict[str, Any] | None, folder: Path) -> list[float]:
    """Losses of the steps after the checkpoint; checks that the whole model is that of the file."""
    trainer = trainer_for(parallel, accumulation=4)
    checkpoint.load_weights(trainer.model, folder)
    state = checkpoint.load_train_state(folder)
    trainer.restore(state.tensors, state.values)
    plain = trainer.gathered()
    for name, value in plain.named_parameters() if plain else ():
        with tensors.opened(folder / "model.safetensors") as file:
            assert torch.equal(value, file.tensor(name))
    return [trainer.train_step().loss for _ in range(3)]


INTERLEAVED = {"pipeline": 2, "schedule": "interleaved"}


def test_a_checkpoint_of_a_pipeline_is_that_of_one_process(tmp_path: Path):
    of_pipeline, of_one = tmp_path / "pipeline", tmp_path / "one"
    wanted = pytest.approx(saved(None, of_one), rel=2e-6)
    assert all(found == wanted for found in on_ranks(2, saved, INTERLEAVED, of_pipeline))
    assert resumed(None, of_pipeline) == wanted
    checkpoint.load(of_pipeline)  # compares its fingerprint
    for folder in (of_one, of_pipeline):
        found = on_ranks(4, resumed, {"pipeline": 2, "shard": 2}, folder)
        assert all(one == wanted for one in found)


def one_microbatch(schedule: str) -> float:
    trainer = trainer_for({"pipeline": 2, "schedule": schedule}, accumulation=4)
    return trainer.forward_backward([next(trainer.loader)])[0]


def test_a_run_can_be_timed_by_one_microbatch():
    trainer = trainer_for(accumulation=4)
    loss = trainer.forward_backward([next(trainer.loader)])[0]
    for schedule in ("1f1b", "interleaved"):
        assert on_ranks(2, one_microbatch, schedule) == pytest.approx([loss] * 2, rel=2e-6)


Order = list[tuple[int, str, int]]
"""a process's passes: stage, F or B, microbatch"""


def order_of(parallel: dict[str, Any], microbatches: int) -> Order:
    """The passes of this process in one step, as it made them."""
    trainer = trainer_for(parallel, config=UNEVEN["config"], accumulation=microbatches, steps=1)
    order = Order()

    def logged(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def logging(stage: Any, microbatch: int, *args: Any, **options: Any) -> Any:
            order.append((stage.stage_index, kind, microbatch))
            return call(stage, microbatch, *args, **options)

        return logging

    forward, backward = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk
    with (
        patch.object(PipelineStage, "forward_one_chunk", logged("F", forward)),
        patch.object(PipelineStage, "backward_one_chunk", logged("B", backward)),
    ):
        trainer.train_step()
    return order


def idle_share(orders: list[Order], stages: int) -> float:
    """Share of idle time if every pass of a stage takes one unit and sending takes none."""
    ended = dict[tuple[int, str, int], int]()
    place, clock = [0] * len(orders), [0] * len(orders)
    while len(ended) < sum(map(len, orders)):
        before = len(ended)
        for process, order in enumerate(orders):
            if place[process] == len(order):
                continue
            stage, kind, batch = order[place[process]]
            if kind == "F":
                needs = (stage - 1, "F", batch) if stage else None
            else:
                needs = (stage + 1, "B", batch) if stage + 1 < stages else (stage, "F", batch)
            if needs is None or needs in ended:
                ready = 0 if needs is None else ended[needs]
                clock[process] = ended[stage, kind, batch] = max(clock[process], ready) + 1
                place[process] += 1
        assert len(ended) > before, "the schedule waits for itself"
    return 1 - len(ended) / (max(clock) * len(orders))


@pytest.mark.parametrize(
    ("schedule", "processes", "each", "microbatches"),
    [("gpipe", 2, 1, 4), ("1f1b", 2, 1, 8), ("1f1b", 4, 1, 8), ("interleaved", 2, 2, 8)],
)
def test_idle_share_of_a_schedule(schedule: str, processes: int, each: int, microbatches: int):
    parallel = {"pipeline": processes, "schedule": schedule}
    orders = on_ranks(processes, order_of, parallel, microbatches)
    assert all(len(order) == 2 * each * microbatches for order in orders)
    expected = (processes - 1) / (each * microbatches + processes - 1)
    assert idle_share(orders, processes * each) == pytest.approx(expected)
