"""Hugging Face folders of GPT-J that are broken or hostile: one line, nothing executed."""

import json
import struct
from pathlib import Path

import pytest
import torch

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.convert.gptj.names import gptj_config
from openpalm.model.transformer import Transformer, initialise


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-J as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("gptj")
    sizes = {"vocab_size": 64, "dim": 16, "depth": 2, "heads": 2, "rotary_dims": 4}
    model = Transformer(gptj_config(**sizes, context=32, ff_dim=64))
    initialise(model, 0)
    checkpoint.save(folder / "ours", model)
    words = ["convert", str(folder / "ours"), str(folder / "theirs"), "--to", "huggingface"]
    assert main(words) == 0
    return folder / "theirs"


WEIGHTS = "model.safetensors"


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def with_header(content: bytes, header: object) -> bytes:
    """The file with another header before the same numbers."""
    numbers = content[8 + struct.unpack("<Q", content[:8])[0] :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def changed(name: str, **entry: object):
    def change(content: bytes) -> bytes:
        header = header_of(content)
        return with_header(content, header | {name: header[name] | entry})

    return change


def renamed(content: bytes) -> bytes:
    header = header_of(content)
    header["transformer.wte.wings"] = header.pop("transformer.wte.weight")
    return with_header(content, header)


def not_a_number(content: bytes) -> bytes:
    return content[:-4] + struct.pack("<f", float("nan"))


LN = "transformer.ln_f.weight"
BAD_WEIGHTS = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:-9],
    "truncated in its header": lambda content: content[:50],
    "a header longer than the file": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
    "a header that is no JSON": lambda content: struct.pack("<Q", 9) + b"not json!" + content,
    "a header of lists": lambda content: with_header(content, [[]] * 1000),
    "numbers after the end": lambda content: content + b"more",
    "negative places": changed(LN, data_offsets=[-64, 0]),
    "places out of the file": changed(LN, data_offsets=[1 << 40, (1 << 40) + 64]),
    "a shape with more numbers": changed(LN, shape=[1 << 50]),
    "an unknown type": changed(LN, dtype="PYOBJ"),
    "whole numbers": changed(LN, dtype="I32"),
    "another shape": changed(LN, shape=[4, 4]),
    "another name": renamed,
    "NaN": not_a_number,
    "a pickle": lambda content: b"\x80\x04cposix\nsystem\n(X\x01\x00\x00\x00atR.",
}


def refused(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", str(folder), str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" not in line
    assert line.startswith("openpalm: error: ")
    assert not out.exists()
    return line


def copy_of(whole: Path, target: Path) -> Path:
    target.mkdir()
    for file in whole.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights(whole, tmp_path, capsys, kind):
    folder = copy_of(whole, tmp_path / "bad")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(BAD_WEIGHTS[kind](content))
    refused(folder, tmp_path / "ours", capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layer": 10**9}, "another model"),
        ({"n_layer": -1}, "n_layer cannot be -1"),
        ({"n_embd": 1 << 40}, "cannot be"),
        ({"n_head": 3}, "n_head 3 does not divide n_embd 16"),
        ({"n_embd": 32}, "where its config.json says"),
        ({"vocab_size": 128}, "where its config.json says"),
        ({"rotary_dim": None}, "lacks rotary_dim"),
        ({"rotary_dim": 400}, "rotary_dims"),
        ({"activation_function": "relu"}, "'relu' is not GPT-J's"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon cannot be 'tiny'"),
        ({"model_type": "llama"}, "llama"),
    ],
)
def test_config(whole, tmp_path, capsys, change, said):
    folder = copy_of(whole, tmp_path / "bad")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert said in refused(folder, tmp_path / "ours", capsys)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"transformer.wte.weight": "../theirs/model.safetensors"}, "no file of its folder"),
        ({"transformer.wte.weight": "/etc/passwd"}, "no file of its folder"),
        ({"transformer.wte.weight": ".hidden"}, "no file of its folder"),
        ({"transformer.wte.weight": ["model.safetensors"]}, "no file of its folder"),
        ({"transformer.wte.weight": "none.safetensors"}, "lacks none.safetensors"),
        ({"transformer.wte.wings": "part.safetensors"}, "is not in the file that it names"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_index(whole, tmp_path, capsys, places, said):
    folder = copy_of(whole, tmp_path / "bad")
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    text = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    assert said in refused(folder, tmp_path / "ours", capsys)


class Canary:
    def __reduce__(self):
        return open, ("executed", "w")


def test_code_in_the_folder_is_not_executed(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy_of(whole, tmp_path / "theirs")
    canary = "open('executed', 'w')\n"
    for name in ("modeling_gptj.py", "__init__.py", "setup.py", "conftest.py", "tokenizer.py"):
        (folder / name).write_text(canary, encoding="utf-8")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values |= {"auto_map": {"AutoModelForCausalLM": "modeling_gptj.GPTJForCausalLM"}}
    values |= {"trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    torch.save({"transformer.wte.weight": Canary()}, folder / "training_args.bin")
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert not (tmp_path / "executed").exists()
    (folder / WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Canary()}, folder / "pytorch_model.bin")
    line = refused(folder, tmp_path / "again", capsys)
    assert "nothing in it was executed" in line
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_weights(whole, tmp_path, capsys):
    folder = copy_of(whole, tmp_path / "bad")
    (folder / WEIGHTS).unlink()
    assert "holds no model.safetensors" in refused(folder, tmp_path / "ours", capsys)
    (folder / "config.json").write_text("{" * 100_000, encoding="utf-8")
    assert "is not valid JSON" in refused(folder, tmp_path / "ours", capsys)
