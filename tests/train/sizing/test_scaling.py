"""--depth: what it derives fits together, gives way to options, and is what the runs say."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openpalm.base.settings import build, plain
from openpalm.base.yaml_file import read_yaml
from openpalm.cli.main import main
from openpalm.errors import SettingsError
from openpalm.model.config import ModelConfig
from openpalm.train.config import ArchSettings, OptimSettings, PretrainSettings
from openpalm.train.microbatches import batch_shape
from openpalm.train.sizing.scaling import RATE_BATCH_POWER, TOKENS_PER_PARAMETER, of_depth, scaled

VOCAB, EPOCH = 1024, 1_000_000
DEPTHS = [1, 2, 3, 4, 6, 8, 12, 20, 40]


def dial(depth: int, **changes: Any) -> PretrainSettings:
    return PretrainSettings(data=Path("d"), out=Path("o"), depth=depth, **changes)


def derived(depth: int, **changes: Any) -> PretrainSettings:
    return scaled(dial(depth, **changes), VOCAB, EPOCH)[0]


def config(depth: int) -> ModelConfig:
    return replace(of_depth(depth).config, vocab_size=VOCAB)


def numbers(settings: PretrainSettings) -> tuple[int, int, float, float, float]:
    """Batch, steps, lr, muon_lr and decay, which are all there."""
    optim = settings.optim
    found = settings.batch_tokens, settings.steps, optim.lr, optim.muon_lr, optim.weight_decay
    assert None not in found
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("depth", DEPTHS)
def test_shapes_divide(depth: int):
    model, settings = config(depth), derived(depth)
    assert model.heads * model.head_dim == model.dim == 64 * depth
    assert (model.kv_heads, model.ff_dim) == (1, 4 * model.dim)
    assert 256 <= model.context <= 2048
    assert model.context.bit_count() == 1
    shape = batch_shape(settings, model.context, processes=1)
    assert shape.sequences * model.context == settings.batch_tokens


@pytest.mark.parametrize("depth", DEPTHS)
def test_length_is_twenty_tokens_a_parameter(depth: int):
    batch, steps, *_ = numbers(derived(depth))
    wanted = TOKENS_PER_PARAMETER * config(depth).parameters
    assert 0 <= batch * steps - wanted < batch


def check_order(values: list[tuple[int, int, float, float, float]]) -> None:
    """A deeper model never has smaller batches, fewer steps or higher rates, nor an odd decay."""
    for before, after in pairwise(values):
        assert after[0] >= before[0]
        assert after[0] * after[1] > before[0] * before[1]
    first, last = values[0], values[-1]
    assert last[2] < first[2]
    assert last[3] < first[3]
    assert all(0 < v[2] < 1 and 0 < v[3] < 1 and 0 < v[4] <= 0.5 for v in values)


def test_the_rules_rise_and_fall_with_depth():
    values = [numbers(derived(depth)) for depth in DEPTHS]
    check_order(values)
    with pytest.raises(AssertionError):
        check_order(values[::-1])


def test_larger_batches_have_the_fitted_share_of_rate():
    small, large = (numbers(derived(2, batch_tokens=b)) for b in (2048, 8192))
    assert small[1] == pytest.approx(4 * large[1], abs=4)
    for place in (2, 3):
        assert large[place] / small[place] == pytest.approx(4**RATE_BATCH_POWER, rel=0.01)


def test_the_fitted_runs_have_the_decay_they_had():
    *_, rate, decay = numbers(derived(2, batch_tokens=2048, sequence_length=256, steps=256))
    assert rate == 0.033
    assert decay == pytest.approx(0.1, rel=0.01)


CHOICES: list[tuple[str, Any]] = [
    ("batch_tokens", 1024),
    ("steps", 7),
    ("sequence_length", 64),
    ("arch.dim", 96),
    ("arch.heads", 3),
    ("arch.head_dim", 32),
    ("arch.ff_dim", 100),
    ("arch.kv_heads", 2),
    ("optim.name", "lion"),
    ("optim.lr", 0.5),
    ("optim.muon_lr", 0.25),
    ("optim.weight_decay", 0.0),
]


def with_choice(name: str, value: Any) -> tuple[PretrainSettings, dict[str, Any]]:
    part, _, field = name.rpartition(".")
    kinds = {"arch": ArchSettings, "optim": OptimSettings}
    changes = {part: kinds[part](**{field: value})} if part else {field: value}
    return scaled(dial(2, **changes), VOCAB, EPOCH)


@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_an_option_wins(name: str, value: Any):
    settings, told = with_choice(name, value)
    part, _, field = name.rpartition(".")
    assert getattr(getattr(settings, part) if part else settings, field) == value
    assert name not in told
    everything = {n for n, _ in CHOICES}
    missing = {name} | ({"optim.muon_lr"} if value == "lion" else set())
    assert told.keys() == everything - missing


@pytest.mark.parametrize("length", [{"minutes": 1.0}, {"epochs": 2.0}])
def test_another_length_stands_for_steps(length: dict[str, float]):
    settings, told = scaled(dial(3, **length), VOCAB, EPOCH)
    assert settings.steps is None
    assert "steps" not in told


def test_the_rules_follow_the_length_that_is_asked_for():
    whole = derived(3)
    assert derived(3, minutes=1.0).optim == whole.optim
    batch, steps, *_ = numbers(whole)
    as_long = derived(3, epochs=batch * steps / EPOCH)
    assert (as_long.batch_tokens, as_long.optim) == (batch, whole.optim)
    rates = [numbers(derived(3, steps=n)) for n in (steps // 64, steps // 8, steps)]
    assert rates[-1] == numbers(whole)
    assert {r[0] for r in rates} == {batch}
    for place in (2, 3):
        assert sorted((r[place] for r in rates), reverse=True) == [r[place] for r in rates]


def test_a_width_changes_what_follows():
    wide, plain_ = derived(2, arch=ArchSettings(dim=256)), derived(2)
    assert numbers(wide)[0] * numbers(wide)[1] > 1.5 * numbers(plain_)[0] * numbers(plain_)[1]


@pytest.mark.parametrize(
    "more", [{"model": "palm-tiny"}, {"init": "x"}, {"arch": ArchSettings(depth=3)}]
)
def test_one_of_depth_model_and_init(more: dict[str, Any]):
    with pytest.raises(SettingsError, match="give --depth alone, without --model, --init or"):
        dial(2, **more)


def test_a_depth_is_above_zero():
    with pytest.raises(SettingsError, match="--depth 0: must be above 0"):
        dial(0)


DERIVED = ("arch.kv_heads", "optim.name", "optim.lr", "optim.muon_lr", "optim.weight_decay")


def check_told(printed: str, stored: PretrainSettings) -> None:
    """The opening lines have what the run's file has, as the options that would set it."""
    words = printed.split()
    for name in DERIVED:
        part, _, field = name.partition(".")
        value = getattr(getattr(stored, part), field)
        assert f"--{name.replace('_', '-')}={value}" in words


@pytest.fixture
def words(data: Path) -> Callable[..., list[str]]:
    def make(out: Path, *more: str) -> list[str]:
        small = ["--arch.dim=16", "--arch.head-dim=8", "--arch.heads=2", "--arch.ff-dim=32"]
        return [
            *("train", "--depth=1", f"--data={data}", f"--out={out}", "--dtype=float32"),
            *("--sequence-length=16", "--batch-tokens=128", *small, *more),
        ]

    return make


def test_a_run_prints_keeps_and_resumes_with_derived_settings(
    words: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    from openpalm.train.sizing import measure

    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1e9)
    run, again = tmp_path / "run", tmp_path / "again"
    assert main(words(run, "--steps=4")) == 0
    printed = capsys.readouterr().err
    stored = build(PretrainSettings, read_yaml(run / "config.yaml"))
    check_told(printed, stored)
    with pytest.raises(AssertionError):
        check_told(printed, replace(stored, optim=replace(stored.optim, muon_lr=0.5)))
    assert main(words(run, "--steps=4")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["train", f"--config={run / 'config.yaml'}", f"--out={again}"]) == 0
    repeated = build(PretrainSettings, read_yaml(again / "config.yaml"))
    assert plain(repeated) == plain(stored) | {"out": str(again)}
