"""Faults in what is computed, met on particular weights or processors: each stays corrected."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openpalm.align.config import GrpoSettings
from openpalm.align.rollouts.grpo import estimate
from openpalm.errors import OpenPalmError
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise


def tiny(vocab_size: int, depth: int = 1) -> Transformer:
    config = ModelConfig(vocab_size=vocab_size, dim=16, depth=depth, heads=2, head_dim=8, ff_dim=16)
    model = Transformer(config)
    initialise(model, 0)
    return model


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr-grpo", "rloo"])
def test_noise_in_the_distance_is_no_advantage(kind):
    """With eight equal rewards, KL noise of 1e-4 a token was scaled to advantages of full size."""
    settings = GrpoSettings(
        data=Path("-"), out=Path("-"), model="palm-tiny", steps=9, advantage=kind, num_completions=8
    )
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 10, generator=generator)
    rollout = SimpleNamespace(
        rewards=torch.ones(8),
        old_log_probs=old,
        reference_log_probs=old + 1e-4 * torch.randn(8, 10, generator=generator),
        mask=torch.ones(8, 10, dtype=torch.bool),
    )
    advantages = estimate(settings, rollout, settings.kl_coef).advantages  # type: ignore[arg-type]
    assert advantages.abs().max() <= 1e-2


@pytest.mark.parametrize("how", [Sampling(seed=1), Sampling(temperature=0)], ids=["drawn", "best"])
@torch.no_grad()
def test_nothing_is_generated_from_nan(how):
    """From weights with a NaN the engine drew ids outside the vocabulary, or answered zeros."""
    model = tiny(60)
    model.norm.weight[0] = torch.nan
    with pytest.raises(OpenPalmError, match="finite"):
        Engine(model).completions([Request([1, 2], 4, how)])


@torch.no_grad()
def test_an_engine_keeps_its_own_weights():
    """Changes to a model after its engine was made reached the engine for some parameters."""
    model = tiny(64, depth=2)
    engine, ids = Engine(model), [1, 5, 9, 3]
    before = engine.score([ids])[0]
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.mul_(3)
        assert torch.equal(engine.score([ids])[0], before), name
        parameter.copy_(kept)


@pytest.fixture
def plain_processor(monkeypatch):
    """A processor with AVX2 alone: no bfloat16 instructions, and torch packs nothing for them."""

    def refuse(*_: object) -> None:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")

    able = {"architecture": "x86_64", "avx2": True, "fma3": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(able), raising=False)
    for name in ("avx512_bf16", "avx512", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)


def test_without_bfloat16_instructions_training_takes_float32(
    plain_processor, said, work, tmp_path
):
    """A processor without these instructions trained in bfloat16, which it has to emulate."""
    out = tmp_path / "run"
    words = ["--data", work / "data", "--out", out, "--steps", 1, "--batch-tokens", 96]
    status, _, errors = said("train", "--init", work / "base", *words)
    assert status == 0, errors
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize(
    "how", ["", "--dtype bfloat16", "--quantize int8", "--quantize int4"], ids=lambda how: how[2:]
)
def test_without_bfloat16_instructions_every_form_samples(plain_processor, said, work, how):
    """Where torch refuses to pack bfloat16 matrices every `sample` but float32's failed."""
    words = ["--max-new-tokens", 4, "--temperature", 0, *how.split()]
    status, output, errors = said("sample", work / "base", "The quick", *words)
    assert status == 0, errors
    assert output.startswith("The quick")
