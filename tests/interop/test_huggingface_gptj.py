"""transformers' GPTJForCausalLM and ours: the same logits and tokens, in both directions."""

import json

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

SHAPES = {
    "usual": {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
    "odd heads": {"vocab_size": 77, "n_embd": 33, "n_layer": 2, "n_head": 3, "rotary_dim": 4},
    "twelve layers": {"vocab_size": 50, "n_embd": 32, "n_layer": 12, "n_head": 2, "rotary_dim": 6},
    "whole head": {"vocab_size": 130, "n_embd": 48, "n_layer": 2, "n_head": 2, "rotary_dim": 24},
    "one head": {
        "vocab_size": 65,
        "n_embd": 10,
        "n_layer": 1,
        "n_head": 1,
        "rotary_dim": 2,
        "n_inner": 27,
        "layer_norm_epsilon": 1e-3,
    },
}
PROMPTS = [[1, 2, 3, 4, 5], [7, 7, 9], [11]]


def theirs(shape, **more):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = GPTJForCausalLM(GPTJConfig(n_positions=64, **ids, **SHAPES[shape], **more)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def greedy_theirs(model, prompt):
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
    return out[0, len(prompt) :].tolist()


def greedy_ours(model):
    requests = [Request(prompt, 20, Sampling(temperature=0.0)) for prompt in PROMPTS]
    return Engine(model, slots=3).completions(requests)


@torch.no_grad()
def compare(model, ours):
    ids = torch.randint(model.config.vocab_size, (2, 40))
    difference = (model(ids).logits - ours.logits(ids)).abs().max().item()
    assert difference < 1e-4
    assert greedy_ours(ours) == [greedy_theirs(model, prompt) for prompt in PROMPTS]


def convert(*words):
    assert main(["convert", *(str(word) for word in words)]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_theirs_into_ours(shape, tmp_path):
    model = theirs(shape)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert(tmp_path / "theirs", tmp_path / "ours")
    compare(model, checkpoint.load(tmp_path / "ours"))


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_into_theirs(shape, tmp_path):
    sizes = SHAPES[shape]
    model = Transformer(
        ModelConfig(
            vocab_size=sizes["vocab_size"],
            dim=sizes["n_embd"],
            depth=sizes["n_layer"],
            heads=sizes["n_head"],
            head_dim=sizes["n_embd"] // sizes["n_head"],
            ff_dim=sizes.get("n_inner", 4 * sizes["n_embd"]),
            kv_heads=sizes["n_head"],
            context=64,
            feedforward="gelu",
            bias=True,
            embedding_bias=shape == "usual",
            tied=False,
            rotary="interleaved",
            rotary_dims=sizes["rotary_dim"],
            norm_eps=sizes.get("layer_norm_epsilon", 1e-5),
        )
    ).eval()
    initialise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    checkpoint.save(tmp_path / "ours", model)
    convert(tmp_path / "ours", tmp_path / "theirs", "--to", "huggingface")
    compare(GPTJForCausalLM.from_pretrained(tmp_path / "theirs").eval(), model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slim_copies(dtype, tmp_path):
    theirs("usual").save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "slim", "--dtype", dtype)
    convert(tmp_path / "slim", tmp_path / "back", "--to", "huggingface")
    read = GPTJForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert read.dtype == getattr(torch, dtype)
    expected = theirs("usual").to(read.dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())


def test_a_pytorch_file_and_a_tied_head(tmp_path):
    model = theirs("usual", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "theirs/pytorch_model.bin")
    convert(tmp_path / "theirs", tmp_path / "ours")
    compare(model, checkpoint.load(tmp_path / "ours"))
    convert(tmp_path / "ours", tmp_path / "back", "--to", "huggingface")
    ours = checkpoint.load(tmp_path / "ours")
    compare(GPTJForCausalLM.from_pretrained(tmp_path / "back").eval(), ours)


def test_other_models_are_named(tmp_path, capsys):
    for kind in ("llama", "gpt2", None, ["gptj"]):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/config.json").write_text(json.dumps({"model_type": kind}))
        status = main(["convert", str(tmp_path / "other"), str(tmp_path / "ours")])
        said = capsys.readouterr().err
        assert status == 2
        assert "reads" in said
        assert len(said.splitlines()) == 1
