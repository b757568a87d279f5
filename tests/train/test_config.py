"""Settings are refused in a line that names option, value and remedy; files repeat them."""

from pathlib import Path
from typing import Any

import pytest

from openpalm.base.settings import build, parse, plain
from openpalm.base.yaml_file import read_yaml, to_yaml
from openpalm.errors import SettingsError
from openpalm.train.batch_shape import BatchShape
from openpalm.train.config import ArchSettings, TrainSettings
from openpalm.train.microbatches import batch_shape
from openpalm.train.optimizer_settings import OptimSettings


def settings(**changes: Any) -> TrainSettings:
    plain: dict[str, Any] = {"data": Path("d"), "out": Path("o"), "model": "palm-tiny", "steps": 5}
    return TrainSettings(**plain | changes)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("steps", 0, "above 0"),
        ("steps", -3, "above 0"),
        ("sequence_length", 0, "above 0"),
        ("batch_tokens", 0, "above 0"),
        ("batch_tokens", -1, "above 0"),
        ("microbatch_tokens", 0, "above 0"),
        ("save_every", 0, "above 0"),
        ("eval_every", -1, "above 0"),
        ("keep_checkpoints", -1, "0 or more"),
        ("max_skipped_steps", 0, "1 or more"),
        ("seed", 2**63, "a 64-bit whole number"),
        ("seed", -(2**63) - 1, "a 64-bit whole number"),
    ],
)
def test_a_wrong_setting_names_option_value_and_remedy(name: str, value: Any, remedy: str):
    with pytest.raises(SettingsError) as caught:
        settings(**{name: value})
    option = "--" + name.replace("_", "-")
    assert str(caught.value).startswith(f"{option} {value}: must be ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("name", ["minutes", "epochs"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, float("inf")])
def test_a_wrong_length_of_the_run(name: str, value: float):
    with pytest.raises(SettingsError, match=rf"^--{name} {value}: must be above 0"):
        settings(steps=None, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("lr", 0.0, "above 0"),
        ("lr", 10.0, "below 10"),
        ("lr", NAN, "above 0"),
        ("muon_lr", 0.0, "above 0"),
        ("weight_decay", -0.1, r"\[0, 1\)"),
        ("weight_decay", 1.0, r"\[0, 1\)"),
        ("beta1", 1.0, r"\[0, 1\)"),
        ("beta2", -0.1, r"\[0, 1\)"),
        ("eps", 0.0, "above 0"),
        ("warmup", 1.1, r"\[0, 1\]"),
        ("final_lr", -0.1, r"\[0, 1\]"),
        ("clip", 0.0, "above 0"),
        ("clip", NAN, "above 0"),
        ("cooldown", 1.5, r"\[0, 1\]"),
    ],
)
def test_a_wrong_optimizer_setting(name: str, value: float, remedy: str):
    option = "optim." + name.replace("_", "-")
    with pytest.raises(SettingsError, match=rf"^--{option} {value}: must be .*{remedy}"):
        OptimSettings(**{name: value})


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"name": "lion", "eps": 1e-8}, "--optim.eps 1e-08: must be left out: lion has none"),
        (
            {"name": "adafactor", "beta2": 0.9},
            "--optim.beta2 0.9: must be left out: adafactor has none",
        ),
        (
            {"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6},
            "--optim.cooldown 0.6: must be at most 1 - warmup (0.5)",
        ),
    ],
)
def test_what_an_optimizer_does_not_have(asked: dict[str, Any], line: str):
    with pytest.raises(SettingsError) as caught:
        OptimSettings(**asked)
    assert str(caught.value) == line


def test_a_file_of_a_run_holds_what_was_not_set():
    values = plain(settings(optim=OptimSettings(name="lion")))["optim"]
    assert (values["beta2"], values["weight_decay"], values["warmup"]) == (0.99, 0.3, 0.05)
    assert values["decay_rule"] == "fixed"


def test_a_file_from_before_these_options_means_the_same():
    old = {
        "name": "adamw",
        "muon_lr": 0.02,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "warmup": 0.05,
        "final_lr": 0.1,
        "clip": 1.0,
    }
    assert build(OptimSettings, old).resolved() == OptimSettings().resolved()


def test_zero_is_a_value():
    assert settings(keep_checkpoints=0, seed=0).keep_checkpoints == 0
    assert OptimSettings(weight_decay=0.0, warmup=0.0, final_lr=0.0, beta1=0.0).warmup == 0.0


def test_a_model_or_a_checkpoint():
    with pytest.raises(SettingsError, match="--init is missing: name the run or checkpoint"):
        settings(model=None)
    assert settings(model=None, init="somewhere").init == "somewhere"


@pytest.mark.parametrize("lengths", [{}, {"steps": 1, "minutes": 1.0}, {"minutes": 1, "epochs": 1}])
def test_exactly_one_length_of_the_run(lengths: dict[str, Any]):
    with pytest.raises(SettingsError, match="exactly one of --steps, --minutes and --epochs"):
        settings(**{"steps": None} | lengths)


@pytest.mark.parametrize(
    ("batch", "micro", "length", "processes", "rows", "accumulation"),
    [
        (None, 8192, 256, 1, 16, 1),
        (None, 1024, 256, 1, 4, 4),
        (1024, 8192, 64, 1, 16, 1),
        (1024, 128, 64, 1, 2, 8),
        (1024, 1, 64, 1, 1, 16),  # a sequence is the least there is
        (6 * 64, 5 * 64, 64, 1, 3, 2),  # 5 rows would fit but do not divide 6
        (7 * 64, 5 * 64, 64, 1, 1, 7),
        (1024, 128, 64, 4, 2, 2),
        (None, 8192, 256, 4, 4, 1),  # 16 sequences of all processes
    ],
)
def test_how_a_step_is_cut(
    batch: int | None, micro: int, length: int, processes: int, rows: int, accumulation: int
):
    asked = settings(batch_tokens=batch, microbatch_tokens=micro)
    shape = batch_shape(asked, length, processes)
    assert shape == BatchShape(length, rows, accumulation, processes=processes)
    assert shape.sequences == rows * accumulation
    assert shape.global_sequences * length == (batch or 16 * length)


@pytest.mark.parametrize(
    ("batch", "length", "processes", "use"),
    [(100, 64, 1, "64 or 128"), (63, 64, 1, "64"), (64, 64, 2, "128")],
)
def test_a_batch_that_does_not_divide(batch: int, length: int, processes: int, use: str):
    with pytest.raises(SettingsError) as caught:
        batch_shape(settings(batch_tokens=batch), length, processes)
    assert str(caught.value) == (
        f"--batch-tokens {batch}: must be a multiple of sequence_length x processes "
        f"({length} x {processes}); use {use}"
    )


MANY = settings(
    steps=None,
    minutes=1.5,
    init="runs/a",
    model=None,
    seed=-7,
    keep_checkpoints=0,
    dtype="bfloat16",
    arch=ArchSettings(kv_heads=2, qk_norm=True, xpos_base=0.0, dropout=0.1),
    optim=OptimSettings(name="muon", lr=1e-5, eps=1e-9, clip=float("inf")),
)


@pytest.mark.parametrize("asked", [settings(), MANY], ids=["defaults", "many"])
def test_a_settings_file_reads_back_equal(asked: TrainSettings, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(asked), encoding="utf-8")
    assert build(TrainSettings, read_yaml(file)) == asked
    argv = ["--config", str(file)]
    assert parse(TrainSettings, argv, verb="train", about="", examples=[]) == asked
