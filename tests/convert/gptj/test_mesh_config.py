"""Configurations of mesh-transformer-jax: what they become, what is refused, and a run of one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from openpalm.cli.main import main
from openpalm.convert.gptj import mesh_config
from openpalm.convert.gptj.mesh_config import FIXED, read_mesh_config
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.model.config import PRESETS
from openpalm.train.config import PretrainSettings
from openpalm.train.optimization.schedule import learning_rate_factor
from openpalm.train.optimizer_settings import OptimSettings

FIELDS = PretrainSettings.__dataclass_fields__
# The values of GPT-J's own configuration.
GPT_J: dict[str, Any] = {
    "layers": 28,
    "d_model": 4096,
    "n_heads": 16,
    "n_vocab": 50400,
    "norm": "layernorm",
    "pe": "rotary",
    "pe_rotary_dims": 64,
    "seq": 2048,
    "cores_per_replica": 8,
    "per_replica_batch": 1,
    "gradient_accumulation_steps": 16,
    "warmup_steps": 3000,
    "anneal_steps": 300000,
    "lr": 1.2e-4,
    "end_lr": 1.2e-5,
    "weight_decay": 0.1,
    "total_steps": 350000,
    "tpu_size": 256,
    "bucket": "bucket",
    "model_dir": "gpt-j",
    "train_set": "pile.train.index",
    "val_set": {"pile": "pile.val.index"},
    "eval_harness_tasks": ["lambada", "piqa"],
    "val_batches": 100,
    "val_every": 500,
    "ckpt_every": 500,
    "keep_every": 10000,
    "name": "GPT3_6B",
    "comment": "",
}
TINY = GPT_J | {
    "layers": 2,
    "d_model": 16,
    "n_heads": 2,
    "pe_rotary_dims": 4,
    "seq": 32,
    "tpu_size": 8,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 1,
    "anneal_steps": 2,
    "total_steps": 4,
    "val_every": 2,
    "ckpt_every": 2,
    "lr": 1e-3,
    "end_lr": 1e-4,
    "cores_per_replica": 2,
}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(tmp_path: Path, **changes: Any):
    return read_mesh_config(write(tmp_path / "c.json", GPT_J | changes), FIELDS)


def test_gpt_j(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mesh_config.importlib.util, "find_spec", lambda name: object())
    found = read(tmp_path, wandb_project="pile")
    assert found is not None
    values = found.values
    config = PRESETS[values["model"]].config
    for name in ("dim", "depth", "heads", "kv_heads", "head_dim", "ff_dim", "rotary_dims"):
        assert values[f"arch.{name}"] == getattr(config, name)
    assert values["sequence_length"] == config.context == 2048
    assert values["batch_tokens"] == 16 * 256 // 8 * 2048 == 1 << 20
    assert (values["steps"], values["eval_every"], values["save_every"]) == (350000, 500, 500)
    assert (values["optim.lr"], values["optim.weight_decay"]) == (1.2e-4, 0.1)
    assert values["out"] == "gpt-j"
    logger = [values[name] for name in ("loggers", "wandb_project", "wandb_name")]
    assert logger == ["wandb", "pile", "GPT3_6B"]
    assert values.items() >= FIXED.items()
    lines = "\n".join(found.lines)
    for key, value in GPT_J.items():
        if value:
            assert f"{key} " in lines or f"{key}:" in lines or f"{key}," in lines
    assert "n_vocab 50400: not used; the tokenizer of the data decides" in found.lines


def test_keep_every_is_used_where_training_has_it(tmp_path: Path):
    path = write(tmp_path / "c.json", GPT_J)
    without, having = (
        read_mesh_config(path, names) for names in ({"eval_every"}, {"eval_every", "keep_every"})
    )
    assert without is not None
    assert having is not None
    assert "keep_every" not in without.values
    assert "keep_every 10000: not used; has no counterpart" in without.lines
    assert having.values["keep_every"] == 10000


def test_without_the_library_the_logger_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mesh_config.importlib.util, "find_spec", lambda name: None)
    found = read(tmp_path)
    assert found is not None
    assert "loggers" not in found.values
    assert any("name: not used, wandb is not installed" in line for line in found.lines)


def original_rate(count: int, config: dict[str, Any]) -> float:
    """The learning rate of mesh-transformer-jax after `count` steps."""
    warm = min(count, config["warmup_steps"]) / config["warmup_steps"]
    fallen = min(max(count - config["warmup_steps"], 0), config["anneal_steps"])
    angle = math.pi * fallen / config["anneal_steps"]
    distance = config["lr"] - config["end_lr"]
    return warm * config["lr"] - distance * (1 - math.cos(angle)) / 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_steps": 7, "anneal_steps": 65, "total_steps": 72},
        {"warmup_steps": 7, "anneal_steps": 650, "total_steps": 72},
    ],
)
def test_the_learning_rate_is_the_originals(changes: dict[str, int], tmp_path: Path):
    config = GPT_J | changes
    found = read_mesh_config(write(tmp_path / "c.json", config), FIELDS)
    assert found is not None
    values = {n[6:]: v for n, v in found.values.items() if n.startswith("optim.")}
    settings, steps = OptimSettings(**values).resolved(), config["total_steps"]
    for step in (1, 3, 7, 8, 40, 70, 71, steps // 2, steps * 9 // 10, steps):
        ours = values["lr"] * learning_rate_factor(step, steps, settings)
        assert ours == pytest.approx(original_rate(step, config), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"norm": "rmsnorm"}, "norm 'rmsnorm': only layernorm is supported"),
        ({"norm": "layernorm-nobias"}, "only layernorm"),
        ({"pe": "t5"}, "pe 't5': only rotary is supported"),
        ({"pe": "fixed"}, "only rotary"),
        ({"pe_rotary_dims": 512}, "must be even and at most d_model / n_heads (256)"),
        ({"pe_rotary_dims": 3}, "must be even"),
        ({"d_model": 4095}, "d_model 4095: must be a multiple of n_heads (16)"),
        ({"layers": "28"}, "layers '28': must be a whole number, 1 or more"),
        ({"layers": True}, "must be a whole number"),
        ({"layers": -1}, "must be a whole number, 1 or more"),
        ({"seq": 1 << 40}, "must be a whole number"),
        ({"seq": None}, "seq None: must be a whole number"),
        ({"lr": float("nan")}, "lr nan: must be a number"),
        ({"lr": 0}, "must be above 0"),
        ({"end_lr": 1}, "at least end_lr"),
        ({"warmup_steps": 400000}, "must be at most total_steps (350000)"),
        ({"tpu_size": 4}, "must be at least cores_per_replica (8)"),
        ({"step_shift": 5}, "step_shift 5: is not supported"),
        ({"model_dir": 3}, "model_dir 3: must be a text"),
        ({"ckpt_every": 0}, "ckpt_every 0: must be a whole number, 1 or more"),
    ],
)
def test_what_is_not_supported_is_one_line(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "c.json", GPT_J | changes)
    assert main(["train", "--config", str(path), "--data", "d"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"openpalm: error: --config {path}: ")
    assert says in error


def test_a_missing_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = {name: value for name, value in GPT_J.items() if name != "lr"}
    path = write(tmp_path / "c.json", content)
    assert main(["train", "--config", str(path), "--data", "d"]) == 2
    assert f"--config {path}: lr is missing; it must be a number" in capsys.readouterr().err


def test_missing_optional_keys_are_told(tmp_path: Path):
    names = ("pe_rotary_dims", "tpu_size", "gradient_accumulation_steps", "val_every", "name")
    content = {name: value for name, value in GPT_J.items() if name not in names}
    found = read_mesh_config(write(tmp_path / "c.json", content), FIELDS)
    assert found is not None
    assert found.values["arch.rotary_dims"] == 256
    assert found.values["batch_tokens"] == 2048
    assert "no pe_rotary_dims: all 256 dimensions of a head are rotated" in found.lines
    assert "no tpu_size: one replica is assumed (8 cores)" in found.lines


def test_other_files_are_not_taken_for_one(tmp_path: Path):
    for content in ({"model": "palm-tiny"}, [1], "layers"):
        assert read_mesh_config(write(tmp_path / "c.json", content), FIELDS) is None
    (tmp_path / "c.json").write_text("model: palm-tiny\n")
    assert read_mesh_config(tmp_path / "c.json", FIELDS) is None
    assert read_mesh_config(tmp_path / "missing.json", FIELDS) is None


def test_a_run_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("A line of text, and one more.\n" * 300)
    data, out = tmp_path / "data", tmp_path / "run"
    prepare(PrepareRequest(inputs=[str(tmp_path / "a.txt")], out=data, tokenizer="byte"))
    path = write(tmp_path / "c.json", TINY)
    words = ["train", "--config", str(path), "--data", str(data), "--out", str(out)]
    assert main([*words, "--dtype", "float32", "--steps", "3"]) == 0
    said = capsys.readouterr().err
    assert f"train: {path}: a configuration of mesh-transformer-jax" in said
    newest = max((out / "checkpoints").iterdir())
    config = json.loads((newest / "config.json").read_text())["model"]
    wanted = {"feedforward": "gelu", "bias": True, "tied": False, "rotary": "interleaved"}
    wanted |= {"rotary_dims": 4, "dim": 16, "heads": 2, "kv_heads": 2, "ff_dim": 64, "context": 32}
    assert wanted.items() <= config.items()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    assert newest.name == "step-00000003"
    assert rates[1] == pytest.approx(1e-3)
    # The weights say what they are: a file that says otherwise is refused.
    other = write(tmp_path / "other.json", TINY | {"pe_rotary_dims": 8})
    words = ["train", "--config", str(other), "--data", str(data), "--init", str(out)]
    assert main([*words, "--out", str(tmp_path / "tuned")]) == 2
    assert "has rotary_dims 4, which its weights fix" in capsys.readouterr().err
