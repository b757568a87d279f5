"""`openpalm plan`: its table, its JSON, and what it refuses."""

import json
from pathlib import Path

import pytest
from command_line import write_base

from openpalm.model.config import preset

SMALL = ("plan", "--model", "palm-1b", "--gpus", "8", "--gpu", "rtx4090", "--tokens", "20e9")


@pytest.mark.parametrize("columns", ["80", "100"])
def test_the_table_fits_the_terminal(said, monkeypatch: pytest.MonkeyPatch, columns: str):
    monkeypatch.setenv("COLUMNS", columns)
    status, output, errors = said(*SMALL, "--cost-per-gpu-hour", "0.5")
    assert (status, errors) == (0, [])
    lines = output.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert lines[0].startswith("palm-1b: 983,")
    head = next(line for line in lines if line.startswith("layout"))
    assert head.split()[-4:] == ["tokens/s", "MFU", "time", "cost"]
    for part in ("weights", "gradients", "moments", "activations", "loss", "gathered", "matmul"):
        assert any(part in line.split() for line in lines), part


def test_json_has_the_numbers_of_each_layout(said):
    status, output, _ = said(*SMALL, "--top", "3", "--shard", "8", "--json")
    found = json.loads(output)
    assert status == 0
    assert found["parameters"] == preset("palm-1b").config.parameters
    (plan,) = found["plans"]
    assert plan["layout"] == {
        "replicate": 1,
        "shard": 8,
        "tensor": 1,
        "pipeline": 1,
        "context": 1,
    }
    assert plan["cost"] is None
    assert plan["days"] * 86400 * plan["tokens_per_s"] == pytest.approx(20e9)


def test_the_mfu_of_palm(said):
    words = ("plan", "--model", "palm-540b", "--gpus", "6144", "--gpu", "tpu-v4")
    status, output, _ = said(*words, "--context", "2048", "--tokens-per-s", "238300")
    assert status == 0
    assert "238,300 tokens/s: 46.2% MFU, " in output


def test_what_does_not_fit_has_a_reason(said):
    status, output, _ = said("plan", "--model", "palm-62b", "--gpus", "4", "--gpu", "a100")
    assert status == 0
    assert "\ndoes not fit: " in output
    assert "15 of 15 layouts do not fit:" in output
    assert " GPUs" in output.split("do not fit:")[1]


def test_a_checkpoint_is_a_model(said, tmp_path: Path):
    base = write_base(tmp_path / "base")
    status, output, _ = said("plan", "--model", base, "--gpu", "h100", "--json")
    assert status == 0
    assert json.loads(output)["context"] == 48


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "64", "--tensor", "32"), "use 1, 2, 4, 8 or 16"),
        (("--gpus", "8", "--shard", "3"), "--shard may be 1, 2, 4 or 8"),
        (("--gpu", "b200"), "--gpu b200: not known; take one of h100"),
        (("--gpu", "t4", "--dtype", "bfloat16"), "t4 has none; take float32"),
        (("--gpus", "0"), "--gpus 0: must be 1 or more"),
        (("--batch-tokens", "100"), "--batch-tokens 100: must be a multiple"),
        (("--lora-rank", "100000"), "lora rank (100000) must be at most"),
    ],
)
def test_refusals(said, words: tuple[str, ...], message: str):
    status, output, errors = said("plan", "--model", "palm-8b", *words)
    assert (status, output, len(errors)) == (2, "", 1)
    assert message in errors[0]


def test_an_unknown_model_names_the_nearest(said):
    status, _, (error,) = said("plan", "--model", "palm-7b")
    assert status == 2
    assert "did you mean palm-8b?" in error


def test_this_machine_is_measured(said):
    words = ("--model", "palm-tiny", "--gpu", "cpu", "--dtype", "float32", "--json")
    status, output, errors = said("plan", *words)
    assert (status, errors) == (0, ["cpu: measuring this machine"])
    assert json.loads(output)["peak_flops"] > 1e8
