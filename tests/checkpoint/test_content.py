"""Files with a valid hash and a wrong content: weights, fingerprint, config, training state."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from checkpoints import CONFIG, made, refused, rewrite_manifest, save, state

import openpalm
from openpalm.base import json_file
from openpalm.base.console import shown
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.directory import TrainState
from openpalm.checkpoint.manifest import verify
from openpalm.errors import CheckpointError, SettingsError


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite(copied: Path, number: float, dtype: str):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    weights["norm.weight"][3] = number
    safetensors.torch.save_file(weights, copied / "model.safetensors")
    (copied / "fingerprint.safetensors").unlink()
    rewrite_manifest(copied)
    with pytest.raises(CheckpointError, match=r"model.safetensors: norm.weight .* not finite"):
        openpalm.load(copied, dtype=dtype)
    said: list[str] = []
    assert not checkpoint.load(copied, allow=said.append).norm.weight.isfinite().all()
    assert len(said) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["optimizer/a.weight/exp_avg", "model/critic.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_is_not_finite(tmp_path: Path, number: float, name: str, dtype: torch.dtype):
    whole = state().tensors | {name: torch.arange(12.0, dtype=dtype).view(3, 4)}
    directory = save(tmp_path / "whole", train=TrainState(whole, {"step": 12}))
    assert torch.equal(checkpoint.load_train_state(directory).tensors[name], whole[name])
    whole[name][2, 1] = number
    directory = save(tmp_path / "ruined", train=TrainState(whole, {"step": 12}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_train_state(directory)
    assert str(caught.value) == (
        f"{directory}/train: {name} holds numbers that are not finite; "
        "take an older checkpoint or another copy"
    )
    openpalm.load(directory)  # what is published is whole


def test_what_a_rollout_keeps_may_be_infinite(tmp_path: Path):
    kept = state().tensors | {"loader/logprobs": torch.tensor([0.0, -float("inf")])}
    directory = save(tmp_path / "rollout", train=TrainState(kept, {"step": 12}))
    found = checkpoint.load_train_state(directory).tensors["loader/logprobs"]
    assert torch.equal(found, kept["loader/logprobs"])


def test_the_fingerprint_notices_other_weights_with_a_valid_manifest(copied: Path):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    weights["blocks.1.project_out.down"][3, 5] += 0.5
    safetensors.torch.save_file(weights, copied / "model.safetensors")
    rewrite_manifest(copied)
    verify(copied)
    assert "computes other logits than when it was written" in refused(copied)


def test_the_fingerprint_notices_other_code(copied: Path, monkeypatch: pytest.MonkeyPatch):
    honest = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: honest(x) * 1.01)
    assert "computes other logits than when it was written" in refused(copied)


def test_the_fingerprint_allows_what_rounding_does(copied: Path):
    pair = safetensors.torch.load_file(copied / "fingerprint.safetensors")
    pair["logits"] += 2e-5 * pair["logits"].abs().max()
    safetensors.torch.save_file(pair, copied / "fingerprint.safetensors")
    rewrite_manifest(copied)
    openpalm.load(copied)


@pytest.mark.parametrize("kind", ["other shape", "other name", "no tensors", "nan"])
def test_a_fingerprint_that_is_none(copied: Path, kind: str):
    file = copied / "fingerprint.safetensors"
    nan = torch.full((1, 16, 80), float("nan"))
    contents = {
        "other shape": {"logits": torch.zeros(1, 16, 7)},
        "other name": {"more": torch.zeros(1)},
        "nan": {"logits": nan},
    }
    if kind == "no tensors":
        file.write_bytes(b"nothing")
    else:
        safetensors.torch.save_file(contents[kind], file)
    rewrite_manifest(copied)
    refused(copied)


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": HUGE},
        {"vocab_size": HUGE},
        {"vocab_size": HUGE, "dim": HUGE},
        {"ff_dim": HUGE},
        {"heads": HUGE, "head_dim": HUGE - 1},
        {"heads": HUGE, "kv_heads": HUGE, "head_dim": HUGE - 1, "dim": HUGE},
        {"depth": 1},
        {"depth": 3},
        {"dim": 8},
        {"tied": False},
        {"bias": True},
        {"vocab_size": 0},
        {"vocab_size": 2**70},
        {"dim": "16"},
        {"dim": True},
        {"rotary": ["halves"]},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_config_that_lies_builds_no_model(copied: Path, changes: dict[str, Any]):
    file = copied / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"] |= changes
    file.write_text(json.dumps(content), encoding="utf-8")
    rewrite_manifest(copied)
    refused(copied)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"model": 1}', "[" * 100_000, '{"format": "openpalm-checkpoint"}'],
    ids=["empty", "list", "null", "torn", "number", "deep", "bare"],
)
def test_a_config_that_is_none(copied: Path, text: str):
    (copied / "config.json").write_text(text, encoding="utf-8")
    rewrite_manifest(copied)
    refused(copied, "config.json")


@pytest.mark.parametrize("file", ["manifest.json", "config.json"])
def test_json_of_any_size_is_not_read(copied: Path, file: str, monkeypatch: pytest.MonkeyPatch):
    with (copied / file).open("r+b") as stream:
        stream.truncate(json_file.MAX_BYTES + 1)  # sparse
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("read it"))
    with pytest.raises(CheckpointError, match="too large"):
        json_file.read_json(copied / file, "take another copy")


@pytest.mark.parametrize("kind", ["other shapes", "other names", "no tensors", "header", "empty"])
def test_weights_of_something_else(copied: Path, kind: str):
    file = copied / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    if kind == "other shapes":
        weights["norm.weight"] = torch.zeros(17)
        safetensors.torch.save_file(weights, file)
    elif kind == "other names":
        weights["norm.scale"] = weights.pop("norm.weight")
        safetensors.torch.save_file(weights, file)
    elif kind == "header":
        file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    else:
        file.write_bytes(b"PK\x03\x04 not tensors" if kind == "no tensors" else b"")
    rewrite_manifest(copied)
    refused(copied, "model.safetensors")


def test_weights_that_fit_another_model_are_refused(pristine: Path):
    with pytest.raises(CheckpointError, match="a checkpoint of another model"):
        checkpoint.load_weights(made(replace(CONFIG, ff_dim=64)), pristine)


# Headers that promise what their file does not hold, as (shape, first byte, last byte, dtype).
LIES = {
    "huge": ([2**40], [0, 2**42], "F32"),
    "huge product": ([2**32, 2**32], [0, 4], "F32"),
    "more than it has": ([8], [0, 32], "F32"),
    "less than it has": ([1], [0, 4], "F32"),
    "backwards": ([1], [16, 12], "F32"),
    "negative": ([-4], [0, 16], "F32"),
    "another dtype": ([4], [0, 16], "PICKLE"),
    "no numbers": (["4"], [0, 16], "F32"),
}


def write_header(path: Path, header: bytes, content: bytes = bytes(16)) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


@pytest.mark.parametrize("kind", LIES)
def test_a_state_with_a_header_that_lies(copied: Path, kind: str):
    shape, offsets, dtype = LIES[kind]
    path = copied / "train" / "state.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_header(path, json.dumps({"a": entry}).encode())
    rewrite_manifest(copied)
    assert checkpoint.load_train_state(copied).tensors["a"].tolist() == [0.0] * 4
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    write_header(path, json.dumps({"a": entry}).encode())
    rewrite_manifest(copied)
    verify(copied)  # nothing but the content is wrong
    assert "cannot be read" in refused(copied, "train/state.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04", bytes(8), b"\xff" * 64])
def test_a_state_that_is_no_safetensors_file(copied: Path, content: bytes):
    (copied / "train" / "state.safetensors").write_bytes(content)
    rewrite_manifest(copied)
    assert "cannot be read" in refused(copied, "train/state.safetensors")


def test_any_damage_to_the_state_s_header_is_a_clear_error_or_another_name(copied: Path):
    """Even with a manifest that agrees: one byte in every ten of the header changed."""
    path = copied / "train" / "state.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    drawn = random.Random(1)
    outcomes = set()
    for first in range(0, header, 10):
        at = drawn.randrange(first, min(first + 10, header))
        other = bytes([whole[at] ^ drawn.randrange(1, 256)])
        path.write_bytes(whole[:at] + other + whole[at + 1 :])
        rewrite_manifest(copied)
        try:
            checkpoint.load_train_state(copied)
            outcomes.add("read")  # a letter of a tensor's name, say
        except CheckpointError as error:
            outcomes.add(str(error).partition(" (")[0])
    assert outcomes <= {"read", f"{path}: cannot be read"}
    assert len(outcomes) == 2


def test_a_state_that_the_manifest_does_not_list_is_not_used(copied: Path):
    """Files beside the listed ones, as torch.distributed.checkpoint writes them, change nothing."""
    expected = checkpoint.load_train_state(copied)
    (copied / "train" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    safetensors.torch.save_file({"half": torch.zeros(3)}, copied / "train" / "more.safetensors")
    found = checkpoint.load_train_state(copied)
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    assert torch.equal(found.tensors["half"], expected.tensors["half"])


@pytest.mark.parametrize("version", ["0.1.0", "9.0", None, ["0.1.0"], "0.1.0\n" + "x" * 200])
def test_a_state_of_another_version_is_refused_by_its_name(copied: Path, version: Any):
    """The model loads; to resume is the user's mistake and no damage of the checkpoint."""
    (copied / "train" / "state.safetensors").rename(copied / "train" / "__0_0.distcp")
    rewrite_manifest(copied, versions={"openpalm": version, "torch": "2.6"})
    with pytest.raises(SettingsError) as caught:
        checkpoint.load_train_state(copied)
    said = str(caught.value)
    assert str(copied) in said
    assert f"was written by OpenPaLM {shown(str(version))}" in said
    assert f"resumed by {openpalm.__version__}" in said
    assert "--init" in said
    assert len(said.splitlines()) == 1
    assert torch.equal(openpalm.load(copied).embedding, made().embedding)


def test_a_state_of_another_version_in_the_same_form_is_read(copied: Path):
    rewrite_manifest(copied, versions={"openpalm": "0.3.0", "torch": "2.6"})
    assert checkpoint.load_train_state(copied).values == state().values
