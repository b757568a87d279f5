"""Tensor-parallel processes compute what one process computes, with the fewest communications.

Tolerances are relative, the largest over ten steps, in float32: loss 2e-6, gradient norm 1e-5.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from layout_runs import CONFIG, curve

from openpalm.model.config import ModelConfig
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
    "palm-rlhf": {"norm_before_head": False, "logit_scale": 0.5, "xpos_base": 512.0},
}
ADAPTER = LoraSettings(rank=2, targets="q,k,v,up,out,down")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"lora": ADAPTER},
    "selective": {"memory": MemorySettings(recompute="selective")},
    "full": {"memory": MemorySettings(recompute="full")},
    "chunks": {"z_loss": 1e-3, "memory": MemorySettings(loss_chunk=7)},
}
CASES = [(shape, "plain") for shape in SHAPES] + [
    (shape, option)
    for shape in ("palm", "gpt-j", "grouped")
    for option in OPTIONS
    if option != "plain"
]
LAYOUTS = {
    "2": (2, {"tensor": 2, "sequence": False}),
    "2-sequence": (2, {"tensor": 2}),
    "4": (4, {"tensor": 4, "sequence": False}),
    "4-sequence": (4, {"tensor": 4}),
    "2x2-shards": (4, {"tensor": 2, "shard": 2}),
    "2x2-replicas": (4, {"tensor": 2, "shard": 1, "replicate": 2, "sequence": False}),
}


def config_of(shape: str) -> ModelConfig:
    return replace(CONFIG, context=27, **SHAPES[shape])  # no process count divides the positions


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_equals_one_process(layout: str):
    processes, parallel = LAYOUTS[layout]
    cases = [case for case in CASES if "dropout" not in SHAPES[case[0]] or "x" not in layout]
    found = on_ranks(processes, all_curves, parallel, cases)
    for number, case in enumerate(cases):
        assert all(curves[number] == found[0][number] for curves in found)
        assert_equal_curves(found[0][number], alone(*case), case)
