"""The arithmetic of sizes reproduces the PaLM paper, and bad values are refused in one line."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from small_models import BASE, SHAPES

from openpalm.errors import SettingsError
from openpalm.model.config import PRESETS, ModelConfig, config_from_json, preset
from openpalm.model.transformer import Transformer

# PaLM (Chowdhery et al. 2022), table 1, to the parameter; the paper leaves the norms out.
TABLE_1 = {
    "palm-8b": 8_631_877_632,
    "palm-62b": 62_495_129_600,
    "palm-540b": 540_354_281_472,
}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str):
    config = preset(name).config
    assert config.parameters - (config.depth + 1) * config.dim == TABLE_1[name]


@pytest.mark.parametrize("name", [*PRESETS, *SHAPES])
def test_parameters_are_those_of_the_model(name: str):
    config = PRESETS[name].config if name in PRESETS else SHAPES[name]
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    padding = config.padded_vocab - config.vocab_size
    tables = config.dim * (1 if config.tied else 2) + (1 if config.bias else 0)
    assert config.parameters == total - padding * tables


def test_flops_reproduce_the_papers_utilisation():
    # Appendix B: 540B at 238.3k tokens/s on 6144 TPU v4 of 275 TFLOP/s uses 46.2 %.
    flops = preset("palm-540b").config.flops_per_token(2048)
    assert round(100 * flops * 238_300 / (6144 * 275e12), 1) == 46.2


def test_cache_of_multi_query_is_one_head_wide():
    assert BASE.kv_bytes_per_token() == 2 * 2 * 8 * 2
    assert replace(BASE, kv_heads=4).kv_bytes_per_token(4) == 2 * 2 * 4 * 8 * 4


def test_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean palm-tiny"):
        preset("palm-tinny")
    with pytest.raises(SettingsError, match="openpalm models"):
        preset("zzz")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 0),
        ("dim", -1),
        ("kv_heads", 3),
        ("rotary_dims", 5),
        ("rotary_dims", 10),
        ("head_dim", 7),
        ("dropout", 1.0),
        ("vocab_size", 1 << 31),
    ],
)
def test_contradictions_are_refused_at_birth(field: str, value: float):
    with pytest.raises(SettingsError, match=rf"{field.replace('head_dim', 'rotary_dims')} \("):
        replace(BASE, **{field: value})


@pytest.mark.parametrize("change", [{"causal": False}, {"rotary": "interleaved"}])
def test_xpos_needs_causal_halves(change: dict):
    with pytest.raises(SettingsError, match="xpos_base"):
        replace(BASE, xpos_base=512.0, **change)


@pytest.mark.parametrize("name", SHAPES)
def test_config_round_trips_through_json(name: str):
    assert config_from_json(asdict(SHAPES[name]), "here") == SHAPES[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wings": 2}, "unknown model field wings"),
        ({"depth": "2"}, "depth cannot be '2'; it must be a whole number"),
        ({"depth": 2.0}, "depth cannot be 2.0"),
        ({"depth": True}, "depth cannot be True"),
        ({"causal": 1}, "causal cannot be 1; it must be true or false"),
        ({"rotary": "sideways"}, "rotary cannot be 'sideways'; it must be one of halves, "),
        ({"rotary": ["halves"]}, "rotary cannot be"),
        ({"rotary_base": None}, "rotary_base cannot be None; it must be a number"),
    ],
)
def test_json_of_other_fields_or_types_is_refused(change: dict, said: str):
    with pytest.raises(SettingsError, match=f"config.json: .*{said}"):
        config_from_json(asdict(BASE) | change, "config.json")


def test_json_that_lacks_a_field_or_is_no_object_is_refused():
    values = asdict(BASE)
    del values["depth"]
    with pytest.raises(SettingsError, match="lack depth"):
        config_from_json(values, "config.json")
    with pytest.raises(SettingsError, match="must be a JSON object"):
        config_from_json([1], "config.json")


def test_defaults_are_palms():
    config = ModelConfig(vocab_size=64, dim=8, depth=1, heads=2, head_dim=4, ff_dim=32)
    assert (config.kv_heads, config.feedforward, config.bias, config.tied) == (
        1,
        "swiglu",
        False,
        True,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, value) for name in ("norm_eps", "rotary_base") for value in (math.nan, math.inf, 0.0)]
    + [("norm_eps", -1.0), ("xpos_base", math.nan), ("xpos_base", -1.0), ("xpos_base", math.inf)],
)
def test_numbers_that_are_not_plausible_are_refused(field: str, value: float):
    with pytest.raises(SettingsError, match=f"model {field}"):
        replace(BASE, **{field: value})
