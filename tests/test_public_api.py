"""Names of the public API, `load` and logits."""

import json
import subprocess
import sys

import pytest
import torch

import openpalm
from openpalm import api
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.rows.preferences import Preference
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "model"
    config = ModelConfig(70, dim=16, depth=2, heads=2, head_dim=8, ff_dim=32, context=16)
    model = Transformer(config)
    initialise(model, seed=1)
    checkpoint.save(path, model, fingerprint=True)
    return path


def test_names_are_the_objects_of_their_homes():
    assert openpalm.load is api.load
    assert openpalm.ModelConfig is ModelConfig
    assert openpalm.Preference is Preference
    assert openpalm.Transformer is Transformer


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'openpalm' has no attribute 'lode'"):
        _ = openpalm.lode
    with pytest.raises(ImportError):
        from openpalm import lode  # noqa: F401


def test_importing_brings_nothing_heavy_and_names_come_on_first_use():
    program = """
import json, sys
import openpalm
dir(openpalm)
before = sorted({name.partition(".")[0] for name in sys.modules})
openpalm.load, openpalm.train, openpalm.Preference
assert "torch" not in sys.modules
openpalm.Transformer
print(json.dumps([before, "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, after = json.loads(done.stdout)
    assert not {"torch", "numpy", "tokenizers", "rich", "yaml", "matplotlib"} & {*before}
    assert after


def test_load_gives_a_model_that_is_ready(saved):
    model = openpalm.load(saved)
    assert isinstance(model, openpalm.Transformer)
    assert not any(module.training for module in model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert openpalm.load(str(saved), device="cpu", dtype="float32").config == model.config


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float_and_as_wide_as_the_vocabulary(saved, kind, dtype):
    model = openpalm.load(saved, dtype=dtype)
    ids = torch.tensor([[0, 5, 69], [1, 2, 3]], dtype=kind)
    with torch.no_grad():
        logits = model.logits(ids)
    assert logits.shape == (2, 3, 70)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_logits_repeat_and_are_causal(saved):
    model = openpalm.load(saved)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole, again, half = model.logits(ids), model.logits(ids), model.logits(ids[:, :6])
    assert torch.equal(whole, again)
    torch.testing.assert_close(whole[:, :6], half, rtol=1e-5, atol=1e-5)


def test_every_error_of_ours_is_one_family(saved):
    with pytest.raises(openpalm.OpenPalmError, match="dtype float16: must be one of"):
        openpalm.load(saved, dtype="float16")
    with pytest.raises(openpalm.OpenPalmError, match="no such checkpoint"):
        openpalm.load(saved / "missing")
