"""Step time: the paper's MFU, the bubble, bytes that are sent, and what overlaps."""

from dataclasses import replace

import pytest

from openpalm.base.device import physical_memory
from openpalm.errors import SettingsError
from openpalm.model.config import preset
from openpalm.plan.devices import DEVICES, measured_cpu
from openpalm.plan.layouts import Layout
from openpalm.plan.time import mfu, seconds_to_send, step_time
from openpalm.plan.training import Training

H100 = DEVICES["h100"]
PALM_8B = Training(preset("palm-8b").config, 2048, rows=4, accumulation=8)


def test_palm_540b_has_the_mfu_of_the_paper():
    """Chowdhery et al. 2022, table 3: 238.3k tokens/s on 6,144 TPU v4 chips, 46.2 % MFU."""
    config, peak = preset("palm-540b").config, DEVICES["tpu-v4"].flops("bfloat16")
    assert f"{mfu(config, 2048, 238_300, 6144, peak):.1%}" == "46.2%"


def test_one_gpu_sends_nothing():
    time = step_time(PALM_8B, Layout(), H100)
    assert sum((time.shard, time.replicate, time.tensor, time.context, time.pipeline)) == 0
    assert time.total == time.matmul + time.attention + time.elementwise + time.optimizer


def test_matmul_time_is_six_flops_a_parameter_and_eight_when_recomputed():
    config = PALM_8B.config
    tokens = PALM_8B.tokens * PALM_8B.accumulation
    norms = (config.depth + 1) * config.dim
    rate = H100.flops("bfloat16") * H100.matmul
    plain = step_time(PALM_8B, Layout(), H100).matmul
    assert plain == pytest.approx(6 * (config.parameters - norms) * tokens / rate)
    again = step_time(replace(PALM_8B, recompute="full"), Layout(), H100).matmul
    table = config.vocab_size * config.dim
    more = 2 * (config.parameters - norms - table) * tokens / rate
    assert again == pytest.approx(plain + more)


def test_a_pipeline_waits_for_its_bubble():
    for chunks in (1, 2):
        layout = Layout(pipeline=4)
        time = step_time(PALM_8B, layout, H100, chunks=chunks)
        busy = time.total - time.optimizer - time.pipeline
        share = (4 - 1) / (
            chunks * PALM_8B.accumulation + 4 - 1
        )  # Narayanan et al. 2021, section 2
        # A little more than the bubble: the states that fill the pipeline are sent, too.
        assert share < time.pipeline / (time.pipeline + busy) < share * 1.01


def test_bytes_between_and_within_nodes():
    slow, bytes_ = replace(H100, inter=20e9), 1e12

    def seconds(layout: Layout, *, both: bool = False) -> float:
        group = (layout.shard, layout.stride("shard"))
        return 0.8 * seconds_to_send(bytes_, group, slow, both=both)

    assert seconds(Layout(shard=8)) == pytest.approx(bytes_ * 7 / 8 / slow.intra)
    # Two nodes: each needs half of the bytes from the other, over eight links.
    between = bytes_ / 2 / (8 * slow.inter)
    assert seconds(Layout(shard=16)) == pytest.approx(between)
    assert seconds(Layout(shard=16), both=True) == pytest.approx(2 * between)
    # With eight tensor ranks a node, every neighbour on the shard axis is on another node.
    assert seconds(Layout(shard=2, tensor=8)) == pytest.approx(bytes_ / 2 / slow.inter)


def test_gathering_is_hidden_by_long_microbatches():
    layout = Layout(shard=64)
    long = step_time(PALM_8B, layout, H100)
    short = step_time(replace(PALM_8B, context=128, rows=1), layout, H100)
    assert long.shard / long.total < 0.01 < short.shard / short.total


def test_devices():
    with pytest.raises(SettingsError, match="t4 has none; take float32"):
        DEVICES["t4"].flops("bfloat16")
    cpu = measured_cpu("float32")
    assert cpu.flops("float32") > 1e8
    assert cpu.bandwidth > 1e8
    assert 1e8 < physical_memory() == cpu.memory
