"""Checkpoint directories: a model and its training state come back; which one of a run is taken."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CONFIG, FILES, TOKENIZER, made, save, state

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import verify
from openpalm.errors import CheckpointError, SettingsError


def names_in(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_the_files_of_a_checkpoint(pristine: Path):
    assert names_in(pristine) == FILES
    manifest = verify(pristine)
    assert sorted(manifest["files"]) == [name for name in FILES if name != "manifest.json"]
    assert manifest["lineage"] == {"step": 12, "parent": None, "why": "é"}
    assert "2 heads" not in (pristine / "card.md").read_text(encoding="utf-8")
    modes = {path.stat().st_mode & 0o777 for path in pristine.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert not list(pristine.parent.glob(".*"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2, "qk_norm": True},
        {"tied": False, "bias": True, "feedforward": "gelu", "rotary": "interleaved"},
        {"xpos_base": 512.0, "dropout": 0.1},
    ],
    ids=["palm", "multi-head", "gpt-j", "xpos"],
)
def test_a_model_comes_back_bit_for_bit(changes: dict[str, Any], tmp_path: Path):
    model = made(replace(CONFIG, **changes))
    save(tmp_path / "ckpt", model)
    back = openpalm.load(tmp_path / "ckpt")
    assert back.config == model.config
    assert not back.training
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    ids = torch.arange(12)[None] * 5 % 80
    assert torch.equal(back.logits(ids), model.logits(ids))
    assert back.logits(ids).shape == (1, 12, 80)


def test_a_model_in_bfloat16_is_the_rounded_one(pristine: Path):
    back = openpalm.load(pristine, dtype="bfloat16")
    for name, value in made().named_parameters():
        assert torch.equal(back.get_parameter(name), value.to(torch.bfloat16))


def test_an_unknown_dtype_is_named(pristine: Path):
    with pytest.raises(SettingsError, match="dtype float16: must be one of float32, bfloat16"):
        openpalm.load(pristine, dtype="float16")


def test_the_training_state_comes_back_bit_for_bit(pristine: Path):
    back, expected = checkpoint.load_train_state(pristine), state()
    assert back.values == expected.values
    assert back.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        if name != "random/cpu":
            assert torch.equal(back.tensors[name], value)
        assert back.tensors[name].dtype == value.dtype
    torch.set_rng_state(back.tensors["random/cpu"])


def test_saving_twice_gives_equal_weights_and_replaces_the_first(tmp_path: Path):
    save(tmp_path / "ckpt", made(seed=1))
    save(tmp_path / "ckpt", made(seed=2))
    back = openpalm.load(tmp_path / "ckpt")
    assert torch.equal(back.embedding, made(seed=2).embedding)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_the_least_a_checkpoint_may_hold(tmp_path: Path):
    checkpoint.save(tmp_path / "ckpt", made())
    assert names_in(tmp_path / "ckpt") == [
        "card.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    assert checkpoint.tokenizer_json(tmp_path / "ckpt") is None
    openpalm.load(tmp_path / "ckpt")


def test_deleting_train_publishes(copied: Path):
    shutil.rmtree(copied / "train")
    assert torch.equal(openpalm.load(copied).embedding, made().embedding)
    assert checkpoint.tokenizer_json(copied) == TOKENIZER
    with pytest.raises(CheckpointError, match=r"holds no train/ to resume; .*--init"):
        checkpoint.load_train_state(copied)


def test_steps_are_in_the_order_of_numbers(a_run: Path):
    (a_run / "checkpoints" / "damaged-step-00000200").mkdir()
    (a_run / "checkpoints" / ".step-00000300.partial-1").mkdir()
    (a_run / "checkpoints" / "step-4").mkdir()
    (a_run / "checkpoints" / "step-00000004.bak").mkdir()
    found = [path.name for path in checkpoint.steps(a_run)]
    assert found == ["step-00000002", "step-00000009", "step-00000010", "step-100000000"]
    assert checkpoint.latest(a_run) == a_run / "checkpoints" / "step-100000000"
    assert checkpoint.resolve(a_run) == checkpoint.latest(a_run)


def test_the_newest_whole_one_is_taken_and_it_says_so(
    a_run: Path, capsys: pytest.CaptureFixture[str]
):
    folder = a_run / "checkpoints"
    (folder / "step-100000000" / "model.safetensors").write_bytes(b"torn")
    (folder / "step-00000010" / "manifest.json").unlink()
    assert checkpoint.latest(a_run) == folder / "step-00000009"
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("passing over a damaged checkpoint:")
    assert "step-100000000: model.safetensors is torn (4 bytes)" in first
    assert "step-00000010" in second
    told: list[str] = []
    assert openpalm.load(a_run)
    checkpoint.latest(a_run, told.append)
    assert len(told) == 2


def test_a_run_without_a_whole_checkpoint(a_run: Path, tmp_path: Path):
    for directory in checkpoint.steps(a_run):
        (directory / "manifest.json").write_text("{}", encoding="utf-8")
    assert checkpoint.latest(a_run) is None
    with pytest.raises(CheckpointError, match=r"its \d+ checkpoints are damaged \(.*; restore one"):
        openpalm.load(a_run)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint yet; let it train longer"):
        openpalm.load(tmp_path / "empty")


def test_a_path_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint or run"):
        openpalm.load(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").write_bytes(b"\x80\x04K\x01.")
        with pytest.raises(CheckpointError, match=r"not a checkpoint of OpenPaLM.*convert"):
            openpalm.load(path)


def test_what_a_killed_save_left_is_cleared(a_run: Path):
    folder = a_run / "checkpoints"
    for name in (".step-00000011.partial-77", ".step-00000002.old"):
        (folder / name / "train").mkdir(parents=True)
        (folder / name / "train" / "state.json").write_bytes(b"{")
    assert checkpoint.latest(a_run) == folder / "step-100000000"
    checkpoint.remove_partial(a_run)
    assert not list(folder.glob(".*"))
    assert len(checkpoint.steps(a_run)) == 4


def test_a_save_after_a_killed_one_of_the_same_number(tmp_path: Path):
    """In a container a process may get the number of the one that was killed."""
    for leftover in (f".ckpt.partial-{os.getpid()}", ".ckpt.old"):
        (tmp_path / leftover / "train").mkdir(parents=True)
        (tmp_path / leftover / "config.json").write_bytes(b"half")
    save(tmp_path / "ckpt")
    save(tmp_path / "ckpt", made(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert torch.equal(openpalm.load(tmp_path / "ckpt").embedding, made(seed=1).embedding)


def test_a_config_of_another_version_names_both_versions(tmp_path: Path):
    landed = Path(__file__).resolve().parents[1] / "landed" / "data" / "palm" / "checkpoint"
    directory = tmp_path / "checkpoint"
    shutil.copytree(landed, directory)
    file = directory / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["wings"] = 2
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_config(directory)
    assert str(caught.value) == (
        f"{file}: was written by OpenPaLM '0.1.0', and this is {openpalm.__version__} (unknown "
        "model field wings); install that version, or take an older checkpoint or another copy"
    )
