"""A small dataset, and the command line with models small enough for a test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rank_runs import in_step
from train_runs import Train
from train_samples import tiny, write_dataset

from openpalm.cli.main import main
from openpalm.model.config import PRESETS, Preset
from openpalm.train.sizing import measure


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "plain")


@pytest.fixture
def train(data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`openpalm train` in this process: options in, exit status out; the last of two wins."""
    monkeypatch.setitem(PRESETS, "tiny", Preset(tiny(vocab_size=265), 1e-2, "for tests"))
    monkeypatch.setitem(PRESETS, "wide", Preset(tiny(vocab_size=265, dim=32), 1e-2, "for tests"))
    monkeypatch.setattr(measure, "matmul_flops", lambda *_: 1e9)

    def call(out: Path, **changes: object) -> int:
        options: dict[str, object] = {
            "model": "tiny",
            "data": data,
            "steps": 8,
            "sequence_length": 16,
            "batch_tokens": 128,
            "microbatch_tokens": 64,
            "dtype": "float32",
            "save_every": 4,
            "eval_every": 4,
            "arch.dropout": 0.1,
        }
        options |= changes
        words = [f"--{name.replace('_', '-')}={v}" for name, v in options.items() if v is not None]
        return main(["train", f"--out={out}", *words])

    return call


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Calls something once, in the middle of the step of that number."""
    return partial(in_step, monkeypatch)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the undisturbed run, which one test makes for all."""
    return tmp_path_factory.mktemp("references")


@pytest.fixture
def reference(train: Train, references: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of eight steps that nothing disturbed; tests leave it as it is."""
    run = references / "run"
    if not run.exists():
        making = references / "making"
        assert train(making) == 0
        capsys.readouterr()
        making.rename(run)
    return run
