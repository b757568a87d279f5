"""`openpalm models`: parameters, memory and FLOPs of the presets."""

import json

import pytest
import torch

from openpalm.model.config import PRESETS
from openpalm.model.transformer import Transformer


@pytest.fixture
def listed(said):
    status, output, errors = said("models", "--json")
    assert (status, errors) == (0, [])
    return {row["name"]: row for row in json.loads(output)}


def test_json_lists_every_preset(listed):
    assert list(listed) == list(PRESETS)


def test_parameters_are_those_of_the_model(listed):
    for name, preset in PRESETS.items():
        config = preset.config
        with torch.device("meta"):
            model = Transformer(config)
        padding = (config.padded_vocab - config.vocab_size) * config.dim
        tables = [t for t in (model.embedding, model.unembedding) if t is not None]
        padding = padding * len(tables) + (
            config.padded_vocab - config.vocab_size if config.bias else 0
        )
        total = sum(parameter.numel() for parameter in model.parameters())
        assert listed[name]["parameters"] == total - padding, name


def test_bytes_follow_from_parameters(listed):
    for row in listed.values():
        assert row["serve_bytes_bfloat16"] == 2 * row["parameters"]
        assert row["train_bytes"] == 16 * row["parameters"]
        config = row["config"]
        kv = 2 * 2 * config["depth"] * config["kv_heads"] * config["head_dim"]
        assert row["kv_cache_bytes_per_token"] == kv


@pytest.mark.parametrize(
    ("name", "billions"), [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35)]
)
def test_the_papers_table_1(listed, name, billions):
    assert listed[name]["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_table_shows_each_model_on_one_line(said):
    status, output, _ = said("models")
    assert status == 0
    for name, preset in PRESETS.items():
        (line,) = [line for line in output.splitlines() if line.split()[:1] == [name]]
        assert f"{preset.config.parameters:,}" in line
