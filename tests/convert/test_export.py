"""A saved model reloads to the same logits, or its directory is removed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openpalm.checkpoint import directory as checkpoint
from openpalm.convert import export
from openpalm.convert.detect import read_foreign
from openpalm.convert.palm_rlhf.read import NO_XPOS_BASE
from openpalm.convert.palm_rlhf.write import write_palm_rlhf
from openpalm.errors import CheckpointError, StorageError, WorkError
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer

Make = Callable[[ModelConfig], Transformer]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": True},
        {"xpos_base": 0.0},
        {"xpos_base": 33.5},
        {"causal": False, "xpos_base": 0.0},
        {"vocab_size": 64},
    ],
    ids=str,
)
def test_ours_to_theirs_and_back(tmp_path: Path, config: ModelConfig, model: Make, change: dict):
    config = replace(config, **change)
    difference, _ = export.save_as_palm_rlhf(model(config), tmp_path / "out")
    assert difference < 1e-5
    assert read_foreign(tmp_path / "out").config == config


def test_a_scale_of_the_logits_goes_into_the_last_norm(
    tmp_path: Path, config: ModelConfig, model: Make
):
    scaled = replace(config, logit_scale=0.3)
    difference, notes = export.save_as_palm_rlhf(model(scaled), tmp_path / "out")
    assert difference < 1e-5
    assert "logit_scale 0.3 folded" in "".join(notes)
    assert read_foreign(tmp_path / "out").config == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kv_heads": 2}, "kv_heads 2"),
        ({"norm_before_head": False}, "norm_before_head False"),
        ({"tied": False}, "tied False"),
        ({"bias": True, "feedforward": "gelu"}, "feedforward gelu"),
        ({"bias": True}, "bias True"),
        ({"ff_dim": 12}, "ff_dim 12, only a multiple of dim"),
        ({"ff_dim": 4}, "ff_dim 4"),
        ({"rotary": "interleaved", "xpos_base": 0.0}, "rotary interleaved"),
        ({"rotary": "nanopalm", "xpos_base": 0.0}, "rotary nanopalm"),
        ({"rotary_dims": 2}, "rotary_dims 2"),
        ({"rotary_base": 500.0}, "rotary_base 500"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
    ],
    ids=str,
)
def test_what_the_original_cannot_say_is_named(
    tmp_path: Path, config: ModelConfig, model: Make, change: dict, field: str
):
    with pytest.raises(CheckpointError, match=f"cannot express {field}"):
        export.save_as_palm_rlhf(model(replace(config, **change)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_xpos_is_a_base_where_its_scale_is_one(config: ModelConfig, model: Make):
    plain = replace(config, xpos_base=0.0)
    arguments, state, notes = write_palm_rlhf(plain, model(plain).state_dict())
    assert arguments["rotary_xpos_scale_base"] == NO_XPOS_BASE
    assert str(NO_XPOS_BASE) in "".join(notes)
    scale = state["layers.0.fn.rotary_emb.scale"]
    power = (torch.arange(100_000) - 50_000) / NO_XPOS_BASE
    assert torch.equal(scale ** power[:, None], torch.ones(100_000, 2))


def test_an_occupied_place_is_refused(tmp_path: Path, config: ModelConfig, model: Make):
    (tmp_path / "empty").mkdir()
    export.save_as_palm_rlhf(model(config), tmp_path / "empty")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="exists already"):
            export.save_as_palm_rlhf(model(config), tmp_path / "empty")
        with pytest.raises(CheckpointError, match="exists already"):
            export.save_as_openpalm(model(config), tmp_path / "empty", lineage={})
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        export.check_output_directory(tmp_path / "link")


def test_a_failed_check_leaves_nothing(
    tmp_path: Path, config: ModelConfig, model: Make, monkeypatch: pytest.MonkeyPatch
):
    def altered(path: Path) -> Transformer:
        other = model(config)
        other.embedding[3, 0] += 1
        return other

    monkeypatch.setattr(checkpoint, "load", altered)
    with pytest.raises(WorkError, match="its reloaded logits differ by"):
        export.save_as_openpalm(model(config), tmp_path / "out", lineage={})
    assert not list(tmp_path.iterdir())

    def broken(path: Path) -> Transformer:
        raise CheckpointError(f"{path}: torn")

    monkeypatch.setattr(checkpoint, "load", broken)
    with pytest.raises(WorkError, match="torn; removed it"):
        export.save_as_openpalm(model(config), tmp_path / "out", lineage={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_full_disk_is_one_line(
    tmp_path: Path,
    config: ModelConfig,
    model: Make,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"cannot be written \(.*(full|space)"):
        export.save_as_palm_rlhf(model(config), tmp_path / "out")
    assert not list(tmp_path.iterdir())
