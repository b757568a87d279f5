"""The trace holds the steps that were asked for, and tracing changes nothing that is computed."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openpalm.base.yaml_file import read_yaml
from openpalm.checkpoint.manifest import read_manifest
from openpalm.cli.main import main
from openpalm.train.logging.metrics import read_rows
from openpalm.train.logging.profile import operators

Train = Callable[..., int]


def optimizer_steps(run: Path) -> int:
    """How many times the trace holds the optimizer's step, which is once a training step."""
    with gzip.open(run / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    steps = [e for e in events if str(e.get("name", "")).startswith("Optimizer.step#")]
    # On a GPU the trace holds each range a second time, as the GPU saw it.
    return sum(e.get("cat") != "gpu_user_annotation" for e in steps)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def test_the_trace_holds_as_many_steps_as_were_asked_for(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "plain") == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert train(run, **{"profile.steps": 2}) == 0
    assert optimizer_steps(run) == 2
    table = (run / "profile" / "operators.txt").read_text(encoding="utf-8")
    assert "aten::" in table  # which ones are slowest depends on what else the machine does
    assert "all, over 2 steps" in table
    said = capsys.readouterr().err
    assert table in said
    assert f"profile: {run}/profile/trace.json.gz; open it at" in said
    assert losses(run) == losses(tmp_path / "plain")


def test_a_profile_is_no_setting_of_the_run(train: Train, tmp_path: Path):
    run = tmp_path / "run"
    assert train(run, **{"profile.steps": 1}) == 0
    assert "profile" not in read_yaml(run / "config.yaml")
    assert train(run) == 0
    assert main(["train", f"--config={run}/config.yaml", f"--out={tmp_path}/again"]) == 0
    assert not (tmp_path / "again" / "profile").exists()
    manifest = read_manifest(run / "checkpoints" / "step-00000008")
    assert not {"profile", "loggers"} & manifest["lineage"]["settings"].keys()


def test_a_run_shorter_than_its_profile(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "short", steps=4, **{"profile.steps": 50}) == 0
    assert optimizer_steps(tmp_path / "short") == 1
    assert train(tmp_path / "shorter", steps=3, **{"profile.steps": 1}) == 0
    assert "--profile.steps: no step was left after 3 to warm up" in capsys.readouterr().err
    assert not (tmp_path / "shorter" / "profile").exists()


def test_no_step_is_no_profile(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(tmp_path / "run", **{"profile.steps": 0}) == 2
    assert "--profile.steps 0: must be 1 or more" in capsys.readouterr().err


def event(key: str, cpu: float, device: float, count: int, kind: str = "CPU") -> Any:
    return SimpleNamespace(
        key=key,
        self_cpu_time_total=cpu,
        self_device_time_total=device,
        count=count,
        device_type=SimpleNamespace(name=kind),
    )


def test_the_table_is_of_own_time_a_step():
    events = [event("b", 1000, 0, 2), event("a", 3000, 0, 8)]
    assert operators(events, 2, "cpu").splitlines()[1:] == [
        " 75.0%      1.500           4.0  a",
        " 25.0%      0.500           1.0  b",
        "  100%      2.000                all, over 2 steps",
    ]


def test_on_a_gpu_kernels_count_once():
    """The operator that launches a kernel carries the kernel's time as well."""
    events = [event("aten::mm", 10, 4000, 1), event("gemm", 0, 4000, 1, "CUDA")]
    lines = operators(events, 1, "cuda").splitlines()
    assert lines[1:] == ["100.0%      4.000           1.0  gemm", lines[-1]]
    assert "4.000" in lines[-1]
