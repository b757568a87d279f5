"""Which layouts are possible, and what is said of the others."""

import math
from dataclasses import replace

import pytest

from openpalm.errors import SettingsError
from openpalm.model.config import preset
from openpalm.plan.layouts import AXES, Layout, layouts, possible_layouts, refusal

PALM_8B = preset("palm-8b").config


def ways(number: int, axes: int) -> int:
    """Ordered factorisations: for each prime, its exponent spread over the axes."""
    count, prime = 1, 2
    while number > 1:
        exponent = 0
        while number % prime == 0:
            number, exponent = number // prime, exponent + 1
        count *= math.comb(exponent + axes - 1, axes - 1)
        prime += 1
    return count


@pytest.mark.parametrize("gpus", [1, 7, 64, 6144])
def test_every_product_is_there_once(gpus: int):
    found = list(layouts(gpus, {}))
    assert {layout.size for layout in found} == {gpus}
    assert len(set(found)) == len(found) == ways(gpus, len(AXES))


def test_fixed_axes_stay():
    found = list(layouts(64, {"tensor": 4, "pipeline": 2}))
    assert {(x.tensor, x.pipeline) for x in found} == {(4, 2)}
    assert len(found) == ways(8, 3)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_tensor_divides_heads(tensor: int):
    config = preset("palm-540b").config
    reason = refusal(Layout(tensor=tensor), config, 6144)
    assert (reason is None) == (config.heads % tensor == 0 and config.ff_dim % tensor == 0)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(tensor=3), "use 1, 2, 4, 8 or 16"),
        (Layout(pipeline=33), "at most depth (32)"),
        (Layout(context=3), "must divide the sequence (2048 tokens)"),
    ],
)
def test_refusals_say_what_is_possible(layout: Layout, words: str):
    assert words in (refusal(layout, PALM_8B, 2048) or "")


def test_vocabulary_and_uneven_stages_refuse_nothing():
    """A padded table divides on any number of ranks; 32 blocks make 5 stages of at most 7."""
    odd = replace(PALM_8B, vocab_size=50257, heads=15, ff_dim=15 * 512)
    assert refusal(Layout(tensor=5), odd, 2560) is None
    assert refusal(Layout(pipeline=5), odd, 2560) is None


def test_one_key_value_head_is_replicated():
    assert PALM_8B.kv_heads == 1
    assert refusal(Layout(tensor=16), PALM_8B, 2048) is None


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"tensor": 32}, "--tensor 32: tensor (32) must divide heads and ff_dim (16, 16384)"),
        ({"shard": 5}, "must divide --gpus (64); --shard may be 1, 2, 4, 8, 16, 32 or 64"),
        (
            {"replicate": 1, "shard": 2, "tensor": 2, "pipeline": 1, "context": 1},
            "their product (4) must be --gpus (64)",
        ),
    ],
)
def test_impossible_axes(fixed: dict[str, int], words: str):
    with pytest.raises(SettingsError) as caught:
        possible_layouts(64, PALM_8B, 2048, fixed)
    assert words in str(caught.value)


def test_neighbours_on_inner_axes_are_near():
    layout = Layout(replicate=2, shard=4, tensor=8, pipeline=2, context=3)
    assert [layout.stride(axis) for axis in ("tensor", "context", "shard", "replicate")] == [
        *(1, 8, 24, 96)
    ]
    assert layout.stride("pipeline") == 192
