"""Runs with damaged checkpoints or settings: passed over, set aside or refused by name."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train_runs import Killed, Train, kill, same_run, send, step_names

from openpalm.checkpoint.manifest import write_manifest


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json", "train/state.json"])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(
    train: Train,
    reference: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    file: str,
):
    out = tmp_path / "run"
    at_step(6, send(signal.SIGINT))
    assert train(out) == 128 + signal.SIGINT
    newest = out / "checkpoints" / "step-00000006"
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / file).write_bytes(content)
    capsys.readouterr()
    assert train(out) == 0
    error = capsys.readouterr().err
    assert "passing over a damaged checkpoint" in error
    assert str(newest) in error
    assert "resuming after step 4" in error
    assert (out / "checkpoints" / "damaged-step-00000006").is_dir()
    assert step_names(out) == ["step-00000004", "step-00000008"]
    assert same_run(out, reference)


@pytest.mark.parametrize("file", ["model.safetensors", "train/state.json", "config.json"])
def test_a_read_error_stops_the_run_and_changes_nothing(
    train: Train,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
):
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    unread = out / "checkpoints" / "step-00000004" / file
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    opened = Path.open

    def broken(path: Path, *more: Any, **named: Any) -> Any:
        if path == unread:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        assert train(out) == 1
    assert f"{unread}: cannot be read (Input/output error)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert train(out) == 0
    assert same_run(out, reference)


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "empty": (lambda state: state.clear(), "'step' is missing"),
    "text for a number": (lambda state: state.update(step="4"), "step is '4'"),
    "another step": (lambda state: state.update(step=3), "step 3"),
    "below zero": (lambda state: state.update(counted=-1), "counted is -1"),
    "no loader": (lambda state: state.pop("loader"), "'loader' is missing"),
    "list for a loader": (lambda state: state.update(loader=[]), "data cursor is []"),
    "no time": (lambda state: state.pop("elapsed_s"), "'elapsed_s' is missing"),
    "list for a time": (lambda state: state.update(elapsed_s=[]), "another type"),
    "time without end": (lambda state: state.update(elapsed_s=float("nan")), "nan s"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_run_saves_is_refused(
    train: Train, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    out = Path(shutil.copytree(reference, tmp_path / "run"))
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    newest = out / "checkpoints" / "step-00000004"
    state = json.loads((newest / "train" / "state.json").read_text(encoding="utf-8"))
    change, says = STATES[kind]
    change(state)
    (newest / "train" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    (newest / "manifest.json").unlink()
    write_manifest(newest, manifest["lineage"])
    assert train(out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert says in error
    assert "Error:" not in error


def test_a_run_of_damaged_checkpoints_is_refused_and_kept(
    train: Train,
    reference: Path,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    at_step(6, kill)
    with pytest.raises(Killed):
        train(out)
    manifest = out / "checkpoints" / "step-00000004" / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-9])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(out) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"openpalm: error: {out}: its one checkpoint is damaged ({manifest}: ")
    assert said.endswith("; restore one from a copy, or train again with another --out")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    manifest.write_bytes(whole)
    assert train(out) == 0
    assert same_run(out, reference)


def test_a_published_checkpoint_cannot_be_resumed(
    train: Train,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "run"
    at_step(6, kill)
    with pytest.raises(Killed):
        train(out)
    shutil.rmtree(out / "checkpoints" / "step-00000004" / "train")
    assert train(out) == 2
    assert "holds no train/ to resume; start from it with --init" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "",
        "steps: [",
        "nonsense",
        "steps: 8\n",
        "more: 1\n",
        "data: d\nout: o\nsteps: [8]\nmodel: m",
        "\x00",
    ],
)
def test_a_damaged_settings_file_is_named(
    train: Train,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
):
    run = Path(shutil.copytree(reference, tmp_path / "run"))
    (run / "config.yaml").write_text(content, encoding="utf-8")
    assert train(run) == 2
    assert "config.yaml" in capsys.readouterr().err.splitlines()[-1]
