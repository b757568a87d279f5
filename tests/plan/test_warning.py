"""The warning before step 1 names options with which the run fits."""

import re
from dataclasses import replace

import pytest

from openpalm.base.settings import build
from openpalm.model.config import preset
from openpalm.plan.layouts import Layout
from openpalm.plan.memory import step_memory
from openpalm.plan.training import Recompute, Training
from openpalm.plan.warning import planned, warn_if_too_large
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import TrainSettings

TRAINING = Training(preset("palm-410m").config, 2048, rows=4, accumulation=4, dtype="float32")
NEEDS = step_memory(TRAINING, Layout(), cuda=False).total


def test_nothing_is_said_of_a_run_that_fits():
    assert warn_if_too_large(TRAINING, NEEDS, cuda=False) is None


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_each_remedy_fits(share: float):
    said = warn_if_too_large(TRAINING, share * NEEDS, cuda=False) or ""
    remedies = re.findall(r"--memory.recompute (\w+)|--microbatch-tokens (\d+)", said)
    assert remedies
    for recompute, tokens in remedies:
        changed = TRAINING
        if " with " in said:
            changed = replace(changed, recompute="full", rows=1)
        elif recompute:
            changed = replace(changed, recompute=recompute)
        else:
            changed = replace(changed, rows=int(tokens) // 2048)
        assert step_memory(changed, Layout(), cuda=False).total <= share * NEEDS


def test_what_no_option_helps():
    said = warn_if_too_large(TRAINING, 1e9, cuda=False) or ""
    assert "of the 0.931 GiB of this machine" in said
    assert said.endswith("at least; take a smaller model or --lora.rank 16")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_planned_reads_the_settings(recompute: Recompute):
    values = {
        "data": "-",
        "out": "-",
        "model": "palm-tiny",
        "steps": 1,
        "optim": {"name": "lion"},
        "memory": {"recompute": recompute, "loss_chunk": 64},
        "lora": {"rank": 4},
    }
    config = preset("palm-tiny").config
    found = planned(build(TrainSettings, values), config, BatchShape(256, 3, 5), "float32")
    assert (found.context, found.rows, found.accumulation) == (256, 3, 5)
    assert (found.optimizer, found.recompute, found.loss_chunk) == ("lion", recompute, 64)
    assert found.lora is not None
    assert found.lora.rank == 4
