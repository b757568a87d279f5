"""Runs: what they write, repeat and refuse; their length, initial weights and recipe."""

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from train_runs import TIMES, Killed, Train, kill, rows, same_run, step_names
from train_samples import write_dataset

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.cli.main import main
from openpalm.model.config import PRESETS
from openpalm.model.transformer import Transformer
from openpalm.parallel.world import World
from openpalm.train.batch_shape import BatchShape
from openpalm.train.logging.metrics import read_rows
from openpalm.train.run import _Session
from openpalm.train.sizing import measure
from openpalm.train.trainer import StepReport


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Every path below with its time of change and content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


def test_a_fresh_run_writes_all_it_should(
    train: Train, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "run"
    assert train(out) == 0
    last = out / "checkpoints" / "step-00000008"
    assert capsys.readouterr().out == f"{last}\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "samples.jsonl",
    ]
    assert step_names(out) == ["step-00000004", "step-00000008"]

    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    info = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert config["steps"] == info["steps"] == 8
    manifest = (data / "manifest.json").read_bytes()
    assert info == {
        "openpalm": openpalm.__version__,
        "steps": 8,
        "processes": 1,
        "dtype": "float32",
        "peak_flops": 1e9,
        "data": hashlib.sha256(manifest).hexdigest(),
    }

    all_rows = read_rows(out / "metrics.jsonl")
    training = [row for row in all_rows if "loss" in row]
    evaluations = [row for row in all_rows if "val_loss" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    assert [row["tokens"] for row in training] == [128 * step for step in range(1, 9)]
    for row in training:
        assert row.keys() >= {"step", "loss", "tokens", "grad_norm", "lr"} | TIMES
        assert 0 < row["loss"] < 7
    elapsed = [row["elapsed_s"] for row in training]
    assert elapsed == sorted(elapsed)
    assert [row["step"] for row in evaluations] == [4, 8]
    assert all(row.keys() == {"step", "val_loss", "val_bits_per_byte"} for row in evaluations)
    samples = read_rows(out / "samples.jsonl")
    assert [row["step"] for row in samples] == [4, 8]
    assert {"prompt", "text"} == samples[0]["samples"][0].keys()


def test_the_last_checkpoint_is_what_its_rows_say(reference: Path, data: Path):
    """The validation row against the checkpoint read back and torch's own mean."""
    from openpalm.data.dataset.shards import open_dataset

    model = checkpoint.load(reference)
    ids = torch.from_numpy(open_dataset(data).tokens("val")[:].astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            logits = model.logits(window[None, :-1])[0]
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    row = rows(reference)[-1]
    assert row["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    manifest = read_manifest(checkpoint.steps(reference)[-1])
    assert manifest["lineage"]["step"] == 8
    assert "out" not in manifest["lineage"]["settings"]
    assert "fingerprint.safetensors" in manifest["files"]


def test_repeating_a_finished_command_changes_nothing(
    train: Train, reference: Path, capsys: pytest.CaptureFixture[str]
):
    before = tree(reference)
    capsys.readouterr()
    assert train(reference) == 0
    assert tree(reference) == before
    assert "finished at step 8 before; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "--seed (0, now 1)"),
        ({"batch_tokens": 256}, "--batch-tokens (128, now 256)"),
        ({"sequence_length": 8}, "--sequence-length (16, now 8)"),
        ({"model": "wide"}, "--model (tiny, now wide)"),
        ({"dtype": "bfloat16"}, "--dtype (float32, now bfloat16)"),
        ({"optim.lr": 0.5}, "--optim (lr not set, now 0.5)"),
        ({"arch.dropout": 0.2}, "--arch (dropout 0.1, now 0.2)"),
    ],
)
def test_other_settings_for_the_same_run_are_refused(
    train: Train,
    reference: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    named: str,
):
    before = tree(reference)
    assert train(reference, **change) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"openpalm: error: --out {reference}: that run was made with another {named}; "
        "choose another --out"
    )
    assert tree(reference) == before


def test_other_data_under_the_same_name_is_refused(
    train: Train, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    assert train(tmp_path / "run", data=copied) == 0
    moved = tmp_path / "elsewhere"
    copied.rename(moved)
    assert train(tmp_path / "run", data=moved) == 0  # the same data, wherever it lies
    shutil.copytree(write_dataset(tmp_path / "other", seed=1), copied)
    before = tree(tmp_path / "run")
    assert train(tmp_path / "run", data=copied) == 2
    assert "made with another --data" in capsys.readouterr().err
    assert tree(tmp_path / "run") == before


def test_a_settings_file_repeats_its_run(train: Train, reference: Path, tmp_path: Path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(reference / "config.yaml"), "--out", str(again)]) == 0
    assert same_run(again, reference)


def test_a_directory_of_something_else_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    before = tree(tmp_path)
    assert train(tmp_path) == 2
    assert "holds notes.txt but no run; choose a new directory" in capsys.readouterr().err
    assert tree(tmp_path) == before
    assert train(tmp_path / "notes.txt") == 2
    assert "a file; choose a directory" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_second_process_is_kept_out(
    train: Train,
    reference: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    statuses: list[int] = []
    at_step(3, lambda: statuses.append(train(out)))
    assert train(out) == 0
    assert statuses == [2]
    assert f"--out {out}: another process is training in it" in capsys.readouterr().err
    assert same_run(out, reference)


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (2, [6, 8]), (0, [2, 4, 6, 8])])
def test_only_the_newest_are_kept(train: Train, tmp_path: Path, keep: int, left: list[int]):
    assert train(tmp_path / "run", keep_checkpoints=keep, save_every=2) == 0
    assert step_names(tmp_path / "run") == [checkpoint.step_name(step) for step in left]


def test_minutes_are_turned_into_steps_once(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_step: Callable[..., None],
):
    out = tmp_path / "run"
    ask: dict[str, Any] = {"steps": None, "minutes": 0.02, "save_every": 3}
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_step_seconds", lambda trainer: 0.1)
        patch.setattr(measure, "_probe_seconds", lambda *_: 0.0)
        at_step(5, kill)
        with pytest.raises(Killed):
            train(out, **ask)
    written = (out / "run.json").read_text(encoding="utf-8")
    steps = json.loads(written)["steps"]
    assert 6 <= steps <= 12
    for name in ("_step_seconds", "matmul_flops"):
        monkeypatch.setattr(measure, name, lambda *_: pytest.fail("measured again"))
    assert train(out, **ask) == 0
    assert (out / "run.json").read_text(encoding="utf-8") == written
    assert checkpoint.steps(out)[-1].name == checkpoint.step_name(steps)
    assert train(out, **ask) == 0
    assert train(out, **ask | {"minutes": 0.03}) == 2


def test_epochs_are_passes_over_the_data(train: Train, data: Path, tmp_path: Path):
    from openpalm.data.dataset.shards import open_dataset

    assert train(tmp_path / "run", steps=None, epochs=0.5, batch_tokens=1024) == 0
    tokens = len(open_dataset(data).tokens("train"))
    training = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert training[-1]["tokens"] == pytest.approx(tokens / 2, abs=1024)


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_init_takes_the_weights_and_nothing_else(train: Train, tmp_path: Path, source: str):
    parent, child, fresh = tmp_path / "parent", tmp_path / "child", tmp_path / "fresh"
    assert train(parent, steps=60, save_every=60, eval_every=60) == 0
    assert train(fresh, steps=2) == 0
    init = parent if source == "run" else checkpoint.steps(parent)[-1]
    ask: dict[str, Any] = {"init": init, "model": None, "steps": 2, "save_every": 1}
    assert train(child, **ask) == 0
    trained, first, untrained = (rows(run) for run in (parent, child, fresh))
    assert trained[59]["loss"] < untrained[0]["loss"] - 1
    assert first[0]["loss"] == pytest.approx(trained[59]["loss"], abs=0.3)
    state = checkpoint.load_train_state(checkpoint.steps(child)[0])
    counters = {float(v) for name, v in state.tensors.items() if name.endswith("/step")}
    assert counters == {1.0}
    manifest = read_manifest(checkpoint.steps(child)[0])
    newest = read_manifest(checkpoint.steps(parent)[-1])
    assert manifest["lineage"]["parent"] == newest["sha256"]
    before = tree(child)
    assert train(child, **ask) == 0
    assert tree(child) == before


def test_init_from_what_does_not_fit_is_refused(
    train: Train, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert train(out, init=reference, model="wide") == 2
    assert "another model than wide (dim 16, not 32); leave --model out" in capsys.readouterr().err
    other = write_dataset(tmp_path / "other", tokenizer="bpe:265")
    assert train(out, init=reference, model=None, data=other) == 2
    said = capsys.readouterr().err
    assert "its own tokenizer.json is another tokenizer than this one; prepare the data" in said
    assert train(tmp_path / "forced", init=reference, model=None, data=other, force=True) == 0
    assert "used anyway (--force)" in capsys.readouterr().err
    larger = write_dataset(tmp_path / "larger", tokenizer="bpe:280")
    assert train(out, init=reference, model=None, data=larger) == 2
    assert "265 ids, this tokenizer 280" in capsys.readouterr().err
    assert train(out, init=tmp_path / "nowhere", model=None) == 2
    assert "no such checkpoint or run" in capsys.readouterr().err
    assert train(out, init=reference, model=None, **{"arch.kv_heads": 2}) == 2
    assert "kv_heads 1, which its weights fix" in capsys.readouterr().err


def test_init_from_another_parent_is_another_run(
    train: Train, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ask: dict[str, Any] = {"model": None, "steps": 2}
    assert train(tmp_path / "child", init=reference, **ask) == 0
    assert train(tmp_path / "second", seed=5) == 0
    assert train(tmp_path / "child", init=tmp_path / "second", **ask) == 2
    assert "made with another --init" in capsys.readouterr().err


def test_a_run_that_only_skips_stops_and_says_why(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def ruined(model: Transformer, seed: int, init: str) -> None:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr("openpalm.train.initial_weights.initialise", ruined)
    assert train(tmp_path / "run", max_skipped_steps=3) == 1
    error = capsys.readouterr().err
    assert "step 2 skipped: loss not finite" in error
    assert "loss not finite, 3 steps in a row" in error.splitlines()[-1]
    assert [row["loss"] for row in rows(tmp_path / "run")] == [None, None]
    assert rows(tmp_path / "run")[0]["skipped"] == "loss not finite"


def test_a_run_with_all_of_palms_recipe(train: Train, tmp_path: Path):
    """Initialisation, logits, Adafactor, schedule and ramp: killed or not, and continued from."""
    recipe = {
        "arch.init": "palm",
        "optim.name": "adafactor",
        "optim.schedule": "palm",
        "batch_ramp": "1/4@0.25,1/2@0.5",
    }
    assert train(tmp_path / "run", **recipe) == 0
    assert train(tmp_path / "again", config=tmp_path / "run" / "config.yaml", **recipe) == 0
    assert same_run(tmp_path / "run", tmp_path / "again")
    model = checkpoint.load(checkpoint.steps(tmp_path / "run")[-1])
    assert model.config.logit_scale == model.config.dim**-0.5
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert values["optim"]["decay_rule"] == "palm"
    assert train(tmp_path / "more", model=None, init=tmp_path / "run") == 0
    more = checkpoint.load(checkpoint.steps(tmp_path / "more")[-1])
    assert more.config.logit_scale == model.config.logit_scale


def test_weights_that_are_there_are_not_initialised(
    train: Train, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ask = {"init": reference, "model": None, "arch.init": "palm"}
    assert train(tmp_path / "run", **ask) == 2
    assert "--arch.init palm: --init brings weights of its own" in capsys.readouterr().err


def test_few_frames_from_the_command_to_the_backward_pass(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A reader who steps from `openpalm train` to `loss.backward()` passes these functions."""
    frames: list[str] = []

    def backward(loss: torch.Tensor) -> None:
        package = str(Path(openpalm.__file__).parent)
        stack = [f for f in traceback.extract_stack() if f.filename.startswith(package)]
        frames.extend(f"{Path(f.filename).stem}.{f.name}" for f in stack)
        raise Killed

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(Killed):
        train(tmp_path / "run")
    assert frames == [
        "main.main",
        "train.run",
        "train.pretrain",
        "run.run_training",
        "run.run",
        "run._step",
        "trainer.train_step",
        "trainer.forward_backward",
        "trainer._accumulate",
    ]


@pytest.mark.parametrize(("busy", "share"), [(1.0, 0.5), (0.5, 1.0), (0.49, None)])
def test_more_than_the_peak_is_no_share_of_it(busy: float, share: float | None):
    """The peak was measured while the machine did something else: a row has no MFU then."""
    config, sequences, length = PRESETS["palm-tiny"].config, 4, 16
    flops = config.flops_per_token(length) * sequences * length
    session: Any = SimpleNamespace(
        settings=SimpleNamespace(trains_all=True),
        info=SimpleNamespace(peak_flops=2 * flops * busy),
        shape=BatchShape(length, sequences, 1),
        trainer=SimpleNamespace(steps=10, counted=1, world=World()),
        spec=SimpleNamespace(config=config, unit="tokens", peak_rate=lambda settings: 1e-3),
        _elapsed_s=lambda: 1.0,
    )
    session._append = lambda file, row: row
    session._mfu = lambda report, rate: _Session._mfu(session, report, rate)
    report = StepReport(3, 2.0, sequences * length, 1.0, 1.0)
    row = _Session._row(session, report, 1.0)
    assert row["mfu"] == share
    assert row["tokens_per_s"] == sequences * length
