"""Stages of a pipeline: blocks dealt out, and settings that are refused in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openpalm.errors import SettingsError
from openpalm.parallel.config import ParallelSettings
from openpalm.parallel.stages import all_stages
from openpalm.train.config import LoraSettings, PretrainSettings, TrainSettings
from openpalm.train.microbatches import batch_shape, check_pipeline

REQUIRED: dict[str, Any] = {
    "data": Path("data"), "out": Path("out"), "model": "palm-tiny", "steps": 1
}  # fmt: skip


def sizes(depth: int, **settings: Any) -> list[int]:
    return [len(stage.blocks) for stage in all_stages(depth, ParallelSettings(**settings))]


@pytest.mark.parametrize(
    ("depth", "settings", "expected"),
    [
        (12, {"pipeline": 4}, [3, 3, 3, 3]),
        (118, {"pipeline": 4}, [30, 30, 29, 29]),  # PaLM 540B
        (6, {"pipeline": 2, "schedule": "interleaved"}, [2, 2, 1, 1]),
    ],
)
def test_blocks_are_dealt_out_evenly_with_fewest_on_the_last_stage(depth, settings, expected):
    assert sizes(depth, **settings) == expected
    stages = all_stages(depth, ParallelSettings(**settings))
    assert [n for stage in stages for n in stage.blocks] == list(range(depth))


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(SettingsError, match=r"4 stages .*interleaved.* has 3 blocks"):
        sizes(3, pipeline=2, schedule="interleaved")


def test_other_verbs_refuse_a_pipeline():
    with pytest.raises(SettingsError, match=r"--parallel.pipeline 2: is for `train`"):
        TrainSettings(**REQUIRED, parallel=ParallelSettings(pipeline=2))


@pytest.mark.parametrize("options", [{"last_layers": 1}, {"lora": LoraSettings(rank=4)}])
def test_a_pipeline_trains_every_weight(options: dict[str, Any]):
    with pytest.raises(SettingsError, match="a pipeline trains every weight"):
        PretrainSettings(**REQUIRED, **options, parallel=ParallelSettings(pipeline=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 32 sequences of 16 tokens, as two microbatches of 16 sequences.
        (
            {},
            "has 2 microbatches, .* 4 needs 4 or more; take --microbatch-tokens 128",
        ),
        ({"batch_ramp": "1/4@.5"}, "has 1 or 4 microbatches, .* take --microbatch-tokens 32"),
        ({"batch_tokens": 32}, "take --batch-tokens a multiple of 64"),
    ],
)
def test_too_few_microbatches_are_refused_with_a_size_that_fits(options, message):
    settings = PretrainSettings(
        **REQUIRED | {"batch_tokens": 512, "microbatch_tokens": 256} | options,
        parallel=ParallelSettings(pipeline=4),
    )
    with pytest.raises(SettingsError, match=message):
        check_pipeline(settings, batch_shape(settings, 16))


def test_interleaved_stages_take_microbatches_in_equal_rounds():
    settings = PretrainSettings(
        **REQUIRED | {"batch_tokens": 10 * 16, "microbatch_tokens": 2 * 16},
        parallel=ParallelSettings(pipeline=2, schedule="interleaved"),
    )
    # 5 microbatches are not two equal rounds; 10 are five.
    with pytest.raises(
        SettingsError,
        match=r"has 5 microbatches, .*2 or more in equal rounds; take --microbatch-tokens 16",
    ):
        check_pipeline(settings, batch_shape(settings, 16))
    fitting = replace(settings, microbatch_tokens=16)
    check_pipeline(fitting, batch_shape(fitting, 16))
