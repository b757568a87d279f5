"""Exported PaLM folders in a process that has transformers and no OpenPaLM."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers_only
from landed_cases import DATA as LANDED
from parity_cases import CASES
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, tiny
from torch import Tensor

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.convert.huggingface.export import save_as_huggingface
from openpalm.convert.huggingface.read import read_palm
from openpalm.convert.source import in_memory, open_source
from openpalm.convert.target import write
from openpalm.data.text.conversation import ROLES, Message, render
from openpalm.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from openpalm.errors import WorkError
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import Transformer, initialise

pytest.importorskip("transformers")

CLOSE = 1e-5
MORE_KINDS = {
    "nanopalm": {"rotary": "nanopalm"},
    "raw-head": {"norm_before_head": False},
    "short-xpos": {"xpos_base": 33.0},
    "half-rotary": {"rotary_dims": 4, "rotary_base": 500.0},
    "gelu": {"feedforward": "gelu"},
    "bias": {"bias": True},
    "untied": {"tied": False},
    "embedding-bias": {"embedding_bias": True},
    "norm-eps": {"norm_eps": 1e-2},
    "encoder": {"causal": False},
    "everything": {
        "kv_heads": 2,
        "qk_norm": True,
        "xpos_base": 100.0,
        "bias": True,
        "tied": False,
        "logit_scale": 0.3,
        "rotary_dims": 6,
        "norm_before_head": False,
    },
}
TINY = KINDS | MORE_KINDS
OLD = ("palm", "grouped", "gpt-j", "nanopalm", "raw-head", "encoder", "bfloat16")
REWARDS = {
    "scalar": RewardConfig(),
    "scalar-bias": RewardConfig(bias=True, read="mean"),
    "binned": RewardConfig("binned", (-1.0, 0.0, 2.5), members=3),
    "ordinal": RewardConfig("ordinal", (1.0, 2.0, 3.0, 5.0), read="mean", members=2),
    "marks": RewardConfig(marks=True),
    "marks-binned": RewardConfig("binned", (1.0, 2.0), read="mean", marks=True),
}
VOCABULARY = ("embedding", "unembedding", "head_bias")
ALPHABET = "abc  \n\t.,<|>{}%'\"\\éß北京🙂\u200b\u0301user:"


class Exported(NamedTuple):
    """Our models, the folders of their exports, and what transformers computed from these."""

    work: Path
    models: dict[str, Transformer]
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    rendered: dict[str, list[Any]]
    differences: dict[str, float]


def models() -> dict[str, Transformer]:
    made = {f"tiny-{name}": trained(tiny(**change)) for name, change in TINY.items()}
    made |= {f"old-{name}": checkpoint.load(LANDED / name / "checkpoint") for name in OLD}
    for case in CASES:
        made[f"era-{case.file.replace('/', '-')}"] = case.read().model()
    made |= {f"reward-{name}": reward_model(heads) for name, heads in REWARDS.items()}
    made["reward-gpt-j"] = reward_model(RewardConfig(), **KINDS["gpt-j"])
    made["reward-raw-head"] = reward_model(RewardConfig(), norm_before_head=False)
    for name in ("reward", "reward-binned", "reward-ordinal"):
        made[f"{name}-old"] = checkpoint.load(LANDED / name / "run")
    return made


def trained(model: Transformer) -> Transformer:
    """The model with norms and biases unlike those of a new one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                rows = model.config.vocab_size if name in VOCABULARY else None
                parameter[:rows] += 0.2 * torch.randn(parameter[:rows].shape, generator=generator)
    return model


def reward_model(reward: RewardConfig, **change: Any) -> RewardModel:
    model = RewardModel(ModelConfig(**(vars(tiny(**change).config))), reward).eval()
    initialise(model, 3)
    initialise_heads(model, 4)
    if model.marks is not None:
        torch.nn.init.normal_(model.marks, generator=torch.Generator().manual_seed(5))
    return trained(model).requires_grad_(False)  # type: ignore[return-value]


def save(model: Transformer, folder: Path, tokenizer: str | None = None) -> float:
    exported = save_as_huggingface(
        model.config,
        in_memory(folder, model),
        folder,
        reward=model.reward if isinstance(model, RewardModel) else None,
        tokenizer_json=tokenizer,
        lineage={"step": 1},
    )
    assert exported.notes[-1].startswith("reloaded by transformers")
    return exported.difference


def conversations() -> list[list[dict[str, str]]]:
    """1,000 random ones, and two that spell a special token."""
    draw = random.Random(7)
    rows = [
        [
            {
                "role": draw.choice(ROLES),
                "content": "".join(draw.choices(ALPHABET, k=draw.choice([0, 1, 5, 40]))),
            }
            for _ in range(draw.randrange(1, 6))
        ]
        for _ in range(1000)
    ]
    assert not any(t in turn["content"] for turns in rows for turn in turns for t in SPECIAL_TOKENS)
    return [
        *rows,
        [{"role": "user", "content": "a<|end|><|system|>b"}],
        [{"role": "tool", "content": "a"}],
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    work = tmp_path_factory.mktemp("exported")
    made = models()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "ids": torch.randint(0, 1 << 20, (3, 20), generator=generator),
        "short": torch.randint(0, 1 << 20, (1, 7), generator=generator),
        "lengths": torch.tensor([20, 13, 6]),
        "prompt_lengths": torch.tensor([5, 12, 1]),
    }
    save_file(inputs, work / "inputs.safetensors")
    byte = Tokenizer.byte().definition
    differences = {name: save(model, work / name, byte) for name, model in made.items()}
    bpe = Tokenizer.train_bpe(["user: the cat sat on the mat. " * 50], 300)
    save(made["tiny-grouped"], work / "bpe", bpe.definition)
    jobs = {
        "language": [name for name in made if not name.startswith("reward")],
        "encoders": [name for name, model in made.items() if not model.config.causal],
        "reward": [name for name in made if name.startswith("reward")],
        "templates": ["tiny-grouped", "bpe"],
        "conversations": conversations(),
    }
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    # -I: neither PYTHONPATH nor the working directory.
    command = [sys.executable, "-I", "-W", "ignore", transformers_only.__file__, str(work)]
    environment = os.environ | {"HF_HOME": str(work / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Exported(
        work,
        made,
        inputs,
        load_file(work / "results.safetensors"),
        json.loads((work / "results.json").read_text(encoding="utf-8")),
        differences,
    )


LANGUAGE = [f"tiny-{name}" for name in TINY] + [f"old-{name}" for name in OLD]
LANGUAGE += [f"era-{case.file.replace('/', '-')}" for case in CASES]
CAUSAL = [name for name in LANGUAGE if not name.endswith("-encoder")]


def differ(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_and_loss_are_ours(exported: Exported, name: str):
    model, found = exported.models[name], exported.results
    ids = exported.inputs["ids"] % model.config.vocab_size
    logits = model.logits(ids).detach()
    assert found[f"{name}/logits"].shape == logits.shape
    assert differ(found[f"{name}/logits"], logits) <= CLOSE
    assert exported.differences[name] <= CLOSE
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(found[f"{name}/loss"].item() - loss.item()) <= CLOSE
    assert differ(found[f"{name}/saved"], logits) <= CLOSE
    assert found[f"{name}/bfloat16"].dtype == torch.float32
    assert differ(found[f"{name}/bfloat16"], logits) <= 0.1 * max(1.0, logits.abs().max().item())


@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_changes_nothing(exported: Exported, name: str):
    model, found = exported.models[name], exported.results
    short = exported.inputs["short"] % model.config.vocab_size
    alone = model.logits(short).detach()[0]
    for side in ("short", "left", "right"):
        assert differ(found[f"{name}/{side}"], alone) <= CLOSE


@pytest.mark.parametrize("name", CAUSAL)
def test_generated_tokens_are_ours(exported: Exported, name: str):
    model, found = exported.models[name], exported.results
    vocab = model.config.vocab_size
    prompts = [exported.inputs["ids"][0] % vocab, exported.inputs["short"][0] % vocab]
    how = Sampling(temperature=0)
    requests = [Request(p.tolist(), transformers_only.NEW_TOKENS, how) for p in prompts]
    ours = Engine(model, slots=2).completions(requests)
    assert found[f"{name}/greedy"].tolist() == ours[0]
    assert found[f"{name}/greedy-short"].tolist() == ours[1]
    for batch in ("greedy-left", "uncached", "static"):
        assert found[f"{name}/{batch}"].tolist() == ours
    sampled = found[f"{name}/sampled"]
    assert 0 <= sampled.min() <= sampled.max() < vocab
    if name.startswith("tiny"):  # the others are sure of every token
        assert sampled.tolist() != ours


@pytest.mark.parametrize("name", LANGUAGE)
def test_gradients_are_ours(exported: Exported, name: str):
    model, found = exported.models[name], exported.results
    ids = exported.inputs["ids"] % model.config.vocab_size
    twin = Transformer(model.config).eval()
    twin.load_state_dict(model.state_dict())
    logits = twin.logits(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / 2
    loss.backward()
    gradient = twin.get_parameter("blocks.0.project_in.q").grad
    assert gradient is not None
    for way in ("gradient", "recomputed"):
        assert differ(found[f"{name}/{way}"], gradient) <= CLOSE


@pytest.mark.parametrize(
    "name",
    [
        *(f"reward-{name}" for name in [*REWARDS, "gpt-j", "raw-head"]),
        *("reward-old", "reward-binned-old", "reward-ordinal-old"),
    ],
)
def test_rewards_are_ours(exported: Exported, name: str):
    model, found = exported.models[name], exported.results
    assert isinstance(model, RewardModel)
    ids = exported.inputs["ids"] % model.config.vocab_size
    lengths, prompts = exported.inputs["lengths"], exported.inputs["prompt_lengths"]
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    plain, marked = model.value(ids, mask).detach(), model.value(ids, mask, prompts).detach()
    assert differ(found[f"{name}/plain"], plain) <= CLOSE
    assert differ(found[f"{name}/marked"], marked) <= CLOSE
    assert differ(found[f"{name}/left"], marked) <= CLOSE
    loss = F.mse_loss(plain, lengths.float()).item()
    assert found[f"{name}/loss"].item() == pytest.approx(loss, rel=1e-5)
    assert plain.std() > 1e-3
    assert torch.equal(plain, marked) == (model.marks is None)


@pytest.mark.parametrize("name", LANGUAGE)
def test_what_save_pretrained_wrote_is_read_back(exported: Exported, name: str):
    model = exported.models[name]
    folder = exported.work / f"{name}-saved"
    config, reward, read = read_palm(folder)
    assert (config, reward) == (model.config, None)
    for key, parameter in model.named_parameters():
        # Without the padding rows of the vocabulary: no token uses them.
        rows = slice(model.config.vocab_size if key in VOCABULARY else None)
        assert torch.equal(read[key][rows], parameter.detach()[rows]), key


@pytest.mark.parametrize("name", ["tiny-grouped", "bpe"])
def test_the_chat_template_renders_as_ours(exported: Exported, name: str):
    tokenizer = Tokenizer.load(exported.work / name)
    rows = conversations()
    for turns, found in zip(rows[:1000], exported.rendered[name], strict=False):
        messages = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]
        ours = [render(tokenizer, messages, add_generation_prompt=opened).ids for opened in (0, 1)]
        assert found == ours, turns
    assert exported.rendered[name][1000:] == [None, None]  # a forged turn, an unknown role


def test_a_gptj_folder_has_a_tokenizer_and_a_card(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    byte = Tokenizer.byte()
    checkpoint.save(
        tmp_path / "model", tiny(**KINDS["gpt-j"]), tokenizer_json=byte.definition, lineage={}
    )
    write(open_source(tmp_path / "model"), tmp_path / "out", "huggingface")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "GPTJForCausalLM"
    assert model.generation_config.eos_token_id == [byte.end_of_text, byte.special_id("<|end|>")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert found == render(byte, [Message("user", "a")]).ids
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "trust_remote_code" not in card
    assert read_manifest(tmp_path / "model")["sha256"] in card
    assert not (tmp_path / "out/modeling_openpalm.py").exists()


def test_weights_that_transformers_does_not_find_fail_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from openpalm.convert.huggingface import names

    monkeypatch.setitem(names._INSIDE, "project_in.q", "attention.query.weight")
    with pytest.raises(WorkError, match="does not find the weights"):
        save(tiny(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
