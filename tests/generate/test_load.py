"""A checkpoint quantized while it loads gives the same tokens as one that is quantized after."""

import pytest
import torch
from tiny_models import tiny

from openpalm.checkpoint import directory as checkpoint
from openpalm.convert.gptj.names import gptj_config
from openpalm.errors import CheckpointError
from openpalm.generate.engine import Engine
from openpalm.generate.load import load_quantized
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.transformer import Transformer, initialise

GPTJ = gptj_config(
    vocab_size=96,
    dim=64,
    depth=3,
    heads=4,
    rotary_dims=8,
    context=64,
    ff_dim=128,
    embedding_bias=True,
)


@pytest.fixture(params=["palm", "gpt-j"])
def folder(request, tmp_path):
    if request.param == "palm":
        model = tiny(0)
    else:
        model = Transformer(GPTJ)
        initialise(model, 0)
        torch.nn.init.normal_(model.embedding_bias, std=0.1)
    checkpoint.save(tmp_path / "saved", model, fingerprint=True)
    return tmp_path / "saved"


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_the_same_as_quantizing_afterwards(folder, weights):
    engines = [
        Engine(load_quantized(folder, weights), slots=1, weights=weights, owned=True),
        Engine(checkpoint.load(folder), slots=1, weights=weights, owned=True),
    ]
    request = Request([1, 2, 3], 12, Sampling(temperature=0))
    first, second = (engine.completions([request]) for engine in engines)
    assert first == second
    scores = [engine.score([[1, 2, 3, 4, 5]])[0] for engine in engines]
    assert torch.equal(*scores)


def test_weights_that_are_not_finite(tmp_path):
    model = tiny(0)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    checkpoint.save(tmp_path / "bad", model)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds numbers"):
        load_quantized(tmp_path / "bad", "bfloat16")
    said = []
    load_quantized(tmp_path / "bad", "bfloat16", allow=said.append)
    assert "norm.weight" in said[0]
