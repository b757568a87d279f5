"""A run directory: what the same run may be continued with, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from train_samples import same, tiny, weights, write_dataset

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import TrainSettings
from openpalm.train.logging.metrics import read_rows
from openpalm.train.microbatches import batch_shape
from openpalm.train.sizing import measure
from openpalm.train.spec import TrainSpec
from openpalm.train.trainer import Trainer

Train = Callable[..., int]
LINE: dict[str, Any] = {"optim.schedule": "cosine", "optim.final_lr": 1, "optim.warmup": 0}
WSD: dict[str, Any] = {"optim.schedule": "wsd", "optim.cooldown": 0.5, "optim.warmup": 0}


def losses(run: Path) -> list[tuple[int, float]]:
    rows = read_rows(run / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def final(run: Path) -> dict[str, torch.Tensor]:
    return weights(checkpoint.load(checkpoint.steps(run)[-1]))


class Killed(BaseException):
    """Ends a run in the middle of a step, as SIGKILL would."""


@pytest.fixture
def begun(train: Train, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begins a run and kills it in the step of that number."""
    original = Trainer.forward_backward

    def call(out: Path, step: int, **options: object) -> None:
        def patched(self: Trainer, batches: Any) -> Any:
            if self.step + 1 == step and self.steps < 10**6:
                raise Killed
            return original(self, batches)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "forward_backward", patched)
            with pytest.raises(Killed):
                train(out, **options)

    return call


@pytest.mark.parametrize(
    "change",
    [
        {"save_every": 1},
        {"save_every": None},
        {"eval_every": 1},
        {"keep_checkpoints": 1},
        {"max_skipped_steps": 20},
        {"device": "cpu"},
        {"loggers": "tensorboard"},
    ],
)
def test_what_cannot_change_the_result_may_change(
    train: Train, begun: Callable[..., None], tmp_path: Path, change: dict[str, Any]
):
    assert train(tmp_path / "reference") == 0
    begun(tmp_path / "run", 6)
    assert train(tmp_path / "run", **change) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "reference")
    assert same(final(tmp_path / "run"), final(tmp_path / "reference"))
    if change == {"keep_checkpoints": 1}:
        assert len(checkpoint.steps(tmp_path / "run")) == 1
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert {name: written.get(name) for name in change} == change


@pytest.mark.parametrize("size", [16, 32, 128])
def test_smaller_and_larger_microbatches_give_the_same_run(
    train: Train, begun: Callable[..., None], tmp_path: Path, size: int
):
    how = {"arch.dropout": 0}
    assert train(tmp_path / "reference", **how) == 0
    begun(tmp_path / "run", 6, **how)
    assert train(tmp_path / "run", microbatch_tokens=size, **how) == 0
    expected = final(tmp_path / "reference")
    for name, found in final(tmp_path / "run").items():
        torch.testing.assert_close(found, expected[name], atol=2e-5, rtol=1e-4)


def test_other_microbatches_are_refused_where_dropout_draws_for_each(
    train: Train, begun: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    begun(tmp_path / "run", 6)
    assert train(tmp_path / "run", microbatch_tokens=32) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "another --microbatch-tokens (64, now 32), and dropout draws other random" in said


def pairs(shape: BatchShape) -> int:
    return max(1, shape.rows // 2) * shape.microbatches


@pytest.mark.parametrize(
    ("before", "now", "items", "said"),
    [
        (64, 32, lambda shape: shape.sequences, None),
        (64, 32, pairs, None),
        (64, 16, pairs, "its steps would have another number of pairs"),
        (64, 32, None, "its loss is estimated for each microbatch"),
    ],
)
def test_where_microbatches_change_the_result(before: int, now: int, items: Any, said: str | None):
    def asked(size: int) -> TrainSettings:
        options: dict[str, Any] = {"batch_tokens": 128, "microbatch_tokens": size}
        return TrainSettings(Path("d"), Path("o"), model="palm-tiny", steps=1, **options)

    spec: Any = SimpleNamespace(config=tiny(), items_per_step=items, shape=None)
    assert TrainSpec.cut_changes(spec, asked(before), 1, batch_shape(asked(now), 16)) == said


@pytest.mark.parametrize(
    ("batch", "before", "now", "changes", "said"),
    [
        (96, 1, 2, {}, None),
        (96, 1, 2, {"items_per_step": pairs}, "its steps would have another number of pairs"),
        (96, 2, 1, {"items_per_step": pairs}, "its steps would have another number of pairs"),
        (128, 1, 2, {"items_per_step": pairs}, None),
        (96, 1, 2, {"items_per_step": None}, "its loss is estimated for each microbatch"),
        (96, 1, 2, {"shape": "of rollouts"}, None),
        (96, 1, 2, {"config": tiny(dropout=0.1)}, "dropout draws other random numbers then"),
    ],
)
def test_where_another_number_of_processes_changes_the_result(
    batch: int, before: int, now: int, changes: dict[str, Any], said: str | None
):
    asked = TrainSettings(Path("d"), Path("o"), model="palm-tiny", steps=1, batch_tokens=batch)
    by_default: Any = next(f.default for f in fields(TrainSpec) if f.name == "items_per_step")
    spec: Any = SimpleNamespace(
        **{"config": tiny(), "items_per_step": by_default, "shape": None} | changes
    )
    spec.cut_changes = partial(TrainSpec.cut_changes, spec)
    shape = batch_shape(asked, 16, now)
    assert TrainSpec.processes_change(spec, asked, before, shape) == said


@pytest.mark.parametrize(("schedule", "killed"), [(WSD, 5), (WSD, 4), (LINE, 8)])
def test_more_steps_continue_where_the_learning_rate_is_constant(
    train: Train,
    begun: Callable[..., None],
    tmp_path: Path,
    schedule: dict[str, Any],
    killed: int,
):
    """A run of eight steps that becomes one of twelve is that of twelve, bit for bit."""
    how = schedule | {"save_every": 2}
    assert train(tmp_path / "reference", steps=12, **how) == 0
    begun(tmp_path / "run", killed, steps=8, **how)
    assert train(tmp_path / "run", steps=12, **how) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "reference")
    assert same(final(tmp_path / "run"), final(tmp_path / "reference"))
    assert train(tmp_path / "run", steps=12, **how) == 0  # it is a run of twelve now


def test_a_finished_run_at_a_constant_rate_may_be_continued(train: Train, tmp_path: Path):
    assert train(tmp_path / "reference", steps=12, **LINE) == 0
    assert train(tmp_path / "run", steps=8, **LINE) == 0
    assert train(tmp_path / "run", steps=12, **LINE) == 0
    assert same(final(tmp_path / "run"), final(tmp_path / "reference"))


@pytest.mark.parametrize(
    ("how", "killed", "steps", "why"),
    [
        ({}, 6, 12, "its cosine schedule is not constant after step 4"),
        (WSD, 8, 12, "its wsd schedule is not constant after step 6"),  # it falls already
        (WSD | {"optim.warmup": 0.5}, 4, 40, "its wsd schedule is not"),  # it rises still
        (LINE | {"batch_ramp": "1/2@0.5"}, 6, 40, "its cosine schedule is not"),
        (LINE, 6, 7, "a shorter run would have had another schedule"),
    ],
)
def test_other_steps_are_refused_where_the_schedule_would_be_another(
    train: Train,
    begun: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: dict[str, Any],
    killed: int,
    steps: int,
    why: str,
):
    out = tmp_path / "run"
    how = {"save_every": 2} | how
    begun(out, killed, **how)
    written = (out / "config.yaml").read_bytes()
    assert train(out, steps=steps, **how) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"openpalm: error: --steps {steps}: --out {out} is a run of 8 steps, ")
    assert why in said
    assert f"--init {out}" in said
    assert (out / "config.yaml").read_bytes() == written


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -3),
        ("steps", 0),
        ("steps", "many"),
        ("steps", None),
        ("dtype", "cow"),
        ("dtype", "bfloat16"),
        ("dtype", None),
        ("dtype", ["float32"]),
        ("peak_flops", 1),
        ("peak_flops", "fast"),
        ("data", 7),
        ("data", "00"),
        ("eval_every", 3),
        ("minutes", 3),
        ("openpalm", None),
        ("cow", 3),
    ],
)
def test_an_edited_run_info_is_refused(
    train: Train,
    begun: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: object,
):
    out = tmp_path / "run"
    begun(out, 6)
    file = out / "run.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content[name] = value
    if value is None:
        del content[name]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert train(out) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(file) in said
    assert losses(out)[-1][0] == 5


def test_an_edited_dtype_is_refused_after_auto(
    train: Train, begun: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """config.yaml does not say what the dtype was: the checkpoint does."""
    monkeypatch.setattr(measure, "_step_seconds", lambda trainer: 1.0)
    out = tmp_path / "run"
    begun(out, 6, dtype="auto")
    assert "dtype: auto" in (out / "config.yaml").read_text(encoding="utf-8")
    file = out / "run.json"
    text = file.read_text(encoding="utf-8")
    assert '"float32"' in text
    file.write_text(text.replace("float32", "bfloat16"), encoding="utf-8")
    assert train(out, dtype="auto") == 2
    file.write_text(text, encoding="utf-8")
    assert train(out, dtype="auto") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "three"}, "steps three: must be a whole number"),
        ({"peak_flops": -1}, "peak_flops -1.0: must be above 0 and finite"),
        ({"cow": True}, "unknown setting cow"),
    ],
)
def test_a_wrong_value_in_run_json_is_one_line_with_a_remedy(
    train: Train,
    begun: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
):
    out = tmp_path / "run"
    begun(out, 6)
    file = out / "run.json"
    content = json.loads(file.read_text(encoding="utf-8")) | change
    file.write_text(json.dumps(content), encoding="utf-8")
    capsys.readouterr()
    assert train(out) == 2
    remedy = "restore it from a copy, or choose another --out"
    assert capsys.readouterr().err == f"openpalm: error: {file}: {said}; {remedy}\n"


def test_a_wrong_value_in_config_yaml_is_one_line_with_a_remedy(
    train: Train, begun: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    begun(out, 6)
    file = out / "config.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("\nseed: ", "\nseed: soon # "), encoding="utf-8")
    capsys.readouterr()
    assert train(out) == 2
    assert capsys.readouterr().err == (
        f"openpalm: error: {file}: not as the run wrote it: seed soon: must be a whole number; "
        "restore it from a copy, or choose another --out\n"
    )


@pytest.mark.parametrize("version", ["0.1.0", "9.0"])
def test_a_run_of_another_version_is_refused_by_name(
    train: Train,
    begun: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    version: str,
):
    out = tmp_path / "run"
    begun(out, 6)
    file = out / "run.json"
    other = json.loads(file.read_text(encoding="utf-8")) | {"openpalm": version, "cow": 1}
    file.write_text(json.dumps(other), encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train(out) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"--out {out}: was written by OpenPaLM '{version}' and cannot be resumed by" in said
    assert f"--init {out}" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_finished_run_of_another_version_stays_finished(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert train(out) == 0
    file = out / "run.json"
    other = json.loads(file.read_text(encoding="utf-8")) | {"openpalm": "0.1.0"}
    file.write_text(json.dumps(other), encoding="utf-8")
    capsys.readouterr()
    assert train(out) == 0
    said = capsys.readouterr()
    assert "finished at step 8 before; nothing to do" in said.out
    assert "was written by OpenPaLM '0.1.0'; its settings were not compared" in said.err


def test_a_repeated_run_keeps_the_dtype_and_steps_that_were_measured(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    ask: dict[str, Any] = {"steps": None, "minutes": 0.02, "dtype": "auto"}
    for name, found in (("_step_seconds", 0.1), ("_probe_seconds", 0.0)):
        monkeypatch.setattr(measure, name, lambda *_, found=found, **named: found)
    assert train(tmp_path / "run", **ask) == 0
    monkeypatch.setattr(measure, "_step_seconds", lambda *_: pytest.fail("measured again"))
    config = tmp_path / "run" / "config.yaml"
    assert "minutes: 0.02" in config.read_text(encoding="utf-8")
    argv = ["train", "--config", str(config), "--out"]
    assert main([*argv, str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    infos = [json.loads((tmp_path / n / "run.json").read_text("utf-8")) for n in ("run", "again")]
    assert infos[0] == infos[1]
    capsys.readouterr()
    other = write_dataset(tmp_path / "other", seed=1)
    assert main([*argv, str(tmp_path / "third"), "--data", str(other)]) == 0
    assert f"warning: --data is not what {tmp_path / 'run'} used" in capsys.readouterr().err


def test_samples_continue_the_prompts_given_else_the_data_s_own(
    train: Train, data: Path, tmp_path: Path
):
    def prompts(run: Path) -> list[str]:
        return [s["prompt"] for s in read_rows(run / "samples.jsonl")[-1]["samples"]]

    assert train(tmp_path / "own") == 0
    text = (data.parent / "text.txt").read_text(encoding="utf-8")
    own = prompts(tmp_path / "own")
    assert own
    assert all(prompt in text for prompt in own)
    assert train(tmp_path / "given", sample_prompts='["a b", "[c]"]') == 0
    assert prompts(tmp_path / "given") == ["a b", "[c]"]
    assert (
        train(tmp_path / "given", sample_prompts="[c]") == 0
    )  # finished, and nothing else differs
