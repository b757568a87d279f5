"""Tensor-parallel processes compute what one process computes, with the fewest communications.

Tolerances are relative, the largest over ten steps, in float32: loss 2e-6, gradient norm 1e-5.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from layout_runs import CONFIG, curve, trainer_for
from torch.distributed.tensor.debug import CommDebugMode

from openpalm.model.config import ModelConfig
from openpalm.model.sharding import local_part
from openpalm.train.config import LoraSettings, MemorySettings
from ranks import on_ranks

GPTJ = {
    "kv_heads": 4,
    "feedforward": "gelu",
    "bias": True,
    "tied": False,
    "rotary": "interleaved",
    "rotary_dims": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "palm": {},
    "gpt-j": GPTJ,
    "embedding-bias": {**GPTJ, "embedding_bias": True, "dropout": 0.1},
    "grouped": {"kv_heads": 2, "heads": 8},
    "qk-norm": {"qk_norm": True},
    "dropout": {"dropout": 0.2},
    "uneven": {"heads": 6, "kv_heads": 2, "ff_dim": 66},
    "palm-rlhf": {"norm_before_head": False, "logit_scale": 0.5, "xpos_base": 512.0},
}
ADAPTER = LoraSettings(rank=2, targets="q,k,v,up,out,down")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": ADAPTER},
    "selective": {"memory": MemorySettings(recompute="selective")},
    "full": {"memory": MemorySettings(recompute="full")},
    "chunks": {"z_loss": 1e-3, "memory": MemorySettings(loss_chunk=50)},
}
CASES = [(shape, "plain") for shape in SHAPES]
CASES += [(shape, option) for shape in ("palm", "gpt-j") for option in list(OPTIONS)[1:]]
CASES += [("grouped", "lora"), ("grouped", "full")]
ON_FOUR = [("palm", "plain"), ("gpt-j", "lora"), ("grouped", "full"), ("qk-norm", "plain")]
LAYOUTS = {
    "3-sequence": (3, {"tensor": 3}),
    "2": (2, {"tensor": 2, "sequence": False}),
    "2-sequence": (2, {"tensor": 2}),
    "4": (4, {"tensor": 4, "sequence": False}),
    "4-sequence": (4, {"tensor": 4}),
    "2x2-shards": (4, {"tensor": 2, "shard": 2}),
    "2x2-replicas": (4, {"tensor": 2, "shard": 1, "replicate": 2, "sequence": False}),
}


def config_of(shape: str) -> ModelConfig:
    return replace(
        CONFIG, depth=2, context=29, **SHAPES[shape]
    )  # no process count divides the positions


def case_curve(shape: str, option: str, parallel: dict[str, Any] | None = None):
    return curve(parallel, config=config_of(shape), **OPTIONS[option])


def all_curves(parallel: dict[str, Any], cases: list[tuple[str, str]]):
    return [case_curve(*case, parallel) for case in cases]


@cache
def alone(shape: str, option: str):
    return case_curve(shape, option)


def assert_equal_curves(found, expected, where: object):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=2e-6), where
        assert norm == pytest.approx(wanted_norm, rel=1e-5), where


def fits(shape: str, parallel: dict[str, Any]) -> bool:
    return SHAPES[shape].get("heads", CONFIG.heads) % parallel["tensor"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_equals_one_process(layout: str):
    processes, parallel = LAYOUTS[layout]
    cases = [case for case in CASES if fits(case[0], parallel)]
    cases = [case for case in cases if processes < 4 or case in ON_FOUR]
    found = on_ranks(processes, all_curves, parallel, cases, limit_s=300)
    for number, case in enumerate(cases):
        assert all(curves[number] == found[0][number] for curves in found)
        assert_equal_curves(found[0][number], alone(*case), case)


def replicas(parallel: dict[str, Any], shape: str) -> dict[str, torch.Tensor]:
    """The parameters that every tensor-parallel process has, after ten steps."""
    trainer = trainer_for(parallel, config=config_of(shape))
    for _ in range(trainer.steps):
        trainer.train_step()
    return {
        name: local_part(parameter).detach()
        for name, parameter in trainer.model.named_parameters()
        if parameter.placements[-1].is_replicate()  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("shape", ["palm", "qk-norm", "gpt-j"])
def test_copies_of_a_parameter_stay_equal_bit_for_bit(shape: str):
    first, second = on_ranks(2, replicas, {"tensor": 2}, shape)
    assert ("blocks.0.project_in.kv" in first) == (shape != "gpt-j")
    assert "blocks.0.norm.weight" in first
    assert all(torch.equal(second[name], value) for name, value in first.items())


def communications(parallel: dict[str, Any], depth: int) -> Counter[str]:
    """Collectives of the forward and backward pass of a microbatch, by name."""
    trainer = trainer_for(parallel, config=replace(CONFIG, depth=depth), accumulation=1)
    batch = next(trainer.loader)
    with CommDebugMode() as communicated:
        loss, _ = trainer.model(trainer.objective.loss, batch)
        loss.backward()
    return Counter({str(name): n for name, n in communicated.get_comm_counts().items()})


GATHER, SCATTER, SUM = "c10d._allgather_base_", "c10d._reduce_scatter_base_", "c10d.allreduce_"


@pytest.mark.parametrize(
    ("sequence", "of_a_block", "of_the_rest"),
    [
        # The rest: the sum of the embeddings, two sums of the loss and one of its gradient.
        (False, {SUM: 2}, {SUM: 4}),
        # Here positions of the embeddings and, before the head, of the states are exchanged.
        (True, {GATHER: 2, SCATTER: 2}, {GATHER: 2, SCATTER: 1, SUM: 3}),
    ],
)
def test_a_block_communicates_the_least_possible(
    sequence: bool, of_a_block: dict[str, int], of_the_rest: dict[str, int]
):
    parallel = {"tensor": 2, "sequence": sequence}
    for depth in (1, 3):
        found = on_ranks(2, communications, parallel, depth)[0]
        blocks = Counter({name: depth * count for name, count in of_a_block.items()})
        assert found == blocks + Counter(of_the_rest)
