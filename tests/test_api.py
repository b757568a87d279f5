"""The public functions: they agree with the model, the command line and each other."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.convert.detect import read_foreign
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.config import OptimSettings, PretrainSettings

TOKENIZER = Tokenizer.byte()
PROMPT = "Once"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        TOKENIZER.vocab_size, dim=16, depth=2, heads=2, head_dim=8, ff_dim=32, context=64
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, config) -> Path:
    path = tmp_path_factory.mktemp("api") / "model"
    model = Transformer(config)
    initialise(model, seed=1)
    with torch.no_grad():  # fresh logits are nearly equal: make a clear best token
        for parameter in model.parameters():
            parameter *= 3
    TOKENIZER.save(path.with_name("tokenizer.json"))
    text = path.with_name("tokenizer.json").read_text(encoding="utf-8")
    checkpoint.save(path, model, tokenizer_json=text)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text = " ".join(f"the word after {i} is {i + 1}." for i in range(600))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    words = [str(folder / "text.txt"), "--out", str(folder / "data"), "--tokenizer", "byte"]
    assert main(["data", "prepare", *words]) == 0
    return folder / "data"


def test_greedy_completion_takes_the_likeliest_tokens(saved):
    model, ids = openpalm.load(saved), [*PROMPT.encode()]
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    expected = [TOKENIZER.decode(ids[len(PROMPT) :])]
    assert openpalm.generate(model, PROMPT, max_new_tokens=10, temperature=0) == expected
    assert openpalm.generate(saved, [PROMPT], max_new_tokens=10, temperature=0) == expected


def test_sampled_completion_is_that_of_the_command_line(saved, capsys):
    words = [str(saved), PROMPT, "--json", "--max-new-tokens", "12", "--seed", "5"]
    assert main(["sample", *words, "--dtype", "float32"]) == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    model = openpalm.load(saved)
    first, second = openpalm.generate(model, [PROMPT, PROMPT], max_new_tokens=12, seed=5)
    assert first == expected
    assert second != first  # equal prompts, draws of their own
    assert openpalm.generate(model, [PROMPT, PROMPT], max_new_tokens=12, seed=5) == [first, second]


def test_scores_are_log_softmax_of_the_logits(saved):
    model = openpalm.load(saved)
    texts = ["Once upon", "é"]
    for text, found in zip(texts, openpalm.score(model, texts), strict=True):
        ids = torch.tensor([TOKENIZER.end_of_text, *text.encode()])
        with torch.no_grad():
            logits = model.logits(ids[None])[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert len(found) == len(text.encode())
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_the_model_stays_as_it_was(saved):
    model = openpalm.load(saved).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    openpalm.generate(model, PROMPT, max_new_tokens=3)
    openpalm.score(model, PROMPT)
    assert model.training
    assert {name: id(p) for name, p in model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_tokenizer_is_given_or_found(saved, config, tmp_path):
    own = openpalm.load(saved)
    made = Transformer(config)
    made.load_state_dict(own.state_dict())
    with pytest.raises(CheckpointError, match=r"did not come from openpalm\.load.*tokenizer="):
        openpalm.generate(made, PROMPT)
    expected = openpalm.generate(own, PROMPT, max_new_tokens=8, seed=2)
    for tokenizer in (TOKENIZER, "byte", saved / "tokenizer.json"):
        given = openpalm.generate(made, PROMPT, max_new_tokens=8, seed=2, tokenizer=tokenizer)
        assert given == expected
    checkpoint.save(tmp_path / "bare", made)
    with pytest.raises(CheckpointError, match="bare: has no tokenizer; give one with tokenizer="):
        openpalm.score(tmp_path / "bare", PROMPT)


def test_wrong_requests(saved, config, tmp_path):
    with pytest.raises(SettingsError, match="max_new_tokens 0: must be 1 or more"):
        openpalm.generate(saved, PROMPT, max_new_tokens=0)
    with pytest.raises(SettingsError, match="tokenizer bpe:300: there is no text to train it on"):
        openpalm.score(saved, PROMPT, tokenizer="bpe:300")
    with pytest.raises(SettingsError, match="temperature -1"):
        openpalm.generate(saved, PROMPT, temperature=-1)
    reward = RewardModel(config, RewardConfig("scalar"))
    initialise(reward, 0)
    with pytest.raises(CheckpointError, match="a reward model scores completions"):
        openpalm.generate(reward, PROMPT)
    with pytest.raises(SettingsError, match="unknown setting stepz"):
        openpalm.train(model="palm-tiny", data="x", out="y", stepz=1)
    with pytest.raises(SettingsError, match="steps many: must be a whole number"):
        openpalm.train(model="palm-tiny", data="x", out="y", steps="many")
    with pytest.raises(SettingsError, match="to gguf: must be one of"):
        openpalm.convert(saved, tmp_path / "out", to="gguf")


def test_train_computes_what_the_command_computes(data, tmp_path, capsys):
    options = {
        "model": "palm-tiny",
        "data": data,
        "steps": 3,
        "sequence_length": 32,
        "batch_tokens": 128,
        "dtype": "float32",
    }
    run = openpalm.train(**options, out=tmp_path / "a", optim={"lr": 0.002})
    assert run == tmp_path / "a"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["train", *words, f"--out={tmp_path / 'b'}", "--optim.lr=0.002"]) == 0
    settings = PretrainSettings(
        **options,  # type: ignore[arg-type]
        out=tmp_path / "c",
        optim=OptimSettings(lr=0.002),
    )
    assert openpalm.train(settings) == tmp_path / "c"
    assert openpalm.train(settings, out=tmp_path / "d", seed=1) == tmp_path / "d"
    a, b, c, d = (openpalm.load(tmp_path / name).state_dict() for name in "abcd")
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not torch.equal(a["embedding"], d["embedding"])
    before = (run / "metrics.jsonl").read_bytes()
    assert openpalm.train(**options, out=run, optim={"lr": 0.002}) == run
    assert (run / "metrics.jsonl").read_bytes() == before


def test_convert_writes_both_ways(saved, tmp_path, capsys):
    out = openpalm.convert(saved, tmp_path / "palm", to="palm-rlhf-pytorch")
    assert out == tmp_path / "palm"
    back = openpalm.convert(out, tmp_path / "back", era="0.8.0")
    output = capsys.readouterr()
    assert output.out == ""
    assert "era: 0.2.4 to 0.8.0" in output.err
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = openpalm.load(saved).logits(ids)
        torch.testing.assert_close(openpalm.load(back).logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert read_foreign(out).project == "palm-rlhf-pytorch"


def test_functions_and_packages_share_names():
    program = """
import openpalm
import openpalm.generate.engine as engine
from openpalm import convert, generate, train
import openpalm.train.config
assert generate is openpalm.generate
assert engine.Engine is openpalm.generate.engine.Engine
assert all(map(callable, (convert, generate, train)))
try:
    openpalm.train()
except openpalm.OpenPalmError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "missing data, out\n"), done.stderr
    assert list(inspect.signature(openpalm.generate).parameters)[:2] == ["model", "prompts"]


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_prints(monkeypatch, capsys, rank, prints):
    def pretrain(settings):
        print("a line")
        print("a warning", file=sys.stderr)

    monkeypatch.setattr("openpalm.cli.train.pretrain", pretrain)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    openpalm.train(model="palm-tiny", data="x", out="y", steps=1)
    print("the caller's own line")
    said = ("a line\n", "a warning\n") if prints else ("", "")
    assert capsys.readouterr() == (f"{said[0]}the caller's own line\n", said[1])
