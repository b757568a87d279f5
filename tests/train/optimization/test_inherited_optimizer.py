"""--keep-optimizer: a run from a checkpoint takes the steps that its run would have taken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_samples import Repeating, made, same, tiny, weights

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest, write_manifest
from openpalm.data.batches import loader
from openpalm.data.batches.loader import Batch
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimizer_settings import OptimSettings

Train = Callable[..., int]
CONSTANT: dict[str, Any] = {"optim.warmup": 0, "optim.final_lr": 1, "arch.dropout": 0}
"""A learning rate that depends on no step, so that only the optimizer remembers."""


@pytest.fixture(autouse=True)
def same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run reads the same two microbatches in every step."""
    ids = torch.randint(265, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    batches = [Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids]
    monkeypatch.setattr(loader, "token_loader", lambda *_, **__: Repeating(*batches))


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / checkpoint.step_name(number)


def trained(directory: Path) -> dict[str, torch.Tensor]:
    return weights(checkpoint.load(directory))


@pytest.mark.parametrize("name", ["adamw", "stable-adamw", "lion", "adafactor", "muon"])
def test_the_next_steps_of_one_run(train: Train, tmp_path: Path, name: str):
    ask = CONSTANT | {"optim.name": name, "optim.lr": 0.01}
    assert train(tmp_path / "whole", steps=15, save_every=5, **ask) == 0
    parent = {"init": step(tmp_path / "whole", 10), "model": None, "steps": 5}
    assert train(tmp_path / "kept", **ask, **parent, keep_optimizer=True) == 0
    assert train(tmp_path / "new", **ask, **parent) == 0
    wanted = trained(step(tmp_path / "whole", 15))
    assert same(trained(step(tmp_path / "kept", 5)), wanted)
    assert not same(trained(step(tmp_path / "new", 5)), wanted)
    states = [checkpoint.load_train_state(step(tmp_path / n, s)).tensors for n, s in ENDS]
    moments = [{k: v for k, v in s.items() if k.startswith("optimizer/")} for s in states]
    assert same(*moments)


ENDS = [("whole", 15), ("kept", 5)]


def test_a_resumed_run_keeps_what_it_has(train: Train, tmp_path: Path):
    """The state of --init is read once; afterwards the run's own checkpoints have it."""
    ask = CONSTANT | {"keep_optimizer": True, "model": None, "steps": 6, "save_every": 3}
    assert train(tmp_path / "parent", **CONSTANT, steps=4) == 0
    for name in ("whole", "resumed"):
        assert train(tmp_path / name, **ask, init=step(tmp_path / "parent", 4)) == 0
    shutil.rmtree(step(tmp_path / "resumed", 6))
    shutil.rmtree(step(tmp_path / "parent", 4) / "train")
    assert train(tmp_path / "resumed", **ask, init=step(tmp_path / "parent", 4)) == 0
    ends = [trained(step(tmp_path / name, 6)) for name in ("whole", "resumed")]
    assert same(*ends)


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the stored state, with a manifest that agrees."""
    file = directory / "train" / "state.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    rewrite_manifest(directory)


def rewrite_manifest(directory: Path) -> None:
    lineage = read_manifest(directory)["lineage"]
    (directory / "manifest.json").unlink()
    write_manifest(directory, lineage)


def name_no_optimizer(directory: Path) -> None:
    """As the versions did that named the optimizer in the lineage only."""
    file = directory / "train" / "state.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["optimizer"]
    file.write_text(json.dumps(state), encoding="utf-8")
    rewrite_manifest(directory)


def test_an_older_checkpoint_names_it_in_the_lineage(train: Train, tmp_path: Path):
    assert train(tmp_path / "parent", steps=2, **CONSTANT) == 0
    parent = step(tmp_path / "parent", 2)
    name_no_optimizer(parent)
    ask = CONSTANT | {"init": parent, "model": None, "steps": 1, "keep_optimizer": True}
    assert train(tmp_path / "out", **ask) == 0
    assert train(tmp_path / "other", **ask | {"optim.name": "lion"}) == 2


KEY = "optimizer/norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "published": (lambda d: shutil.rmtree(d / "train"), {}, "holds no optimizer state"),
    "another optimizer": (
        lambda d: None,
        {"optim.name": "lion"},
        "was trained with adamw, not lion; give --optim.name adamw",
    ),
    "adapter": (lambda d: None, {"lora.rank": 2}, "has no moments; leave it or --lora.rank out"),
    "missing": (
        lambda d: rewritten(d, lambda s: s.pop("optimizer/embedding/exp_avg")),
        {},
        "embedding/exp_avg is missing",
    ),
    "shape": (
        lambda d: rewritten(d, lambda s: s.update({"optimizer/embedding/exp_avg": torch.ones(3)})),
        {},
        "embedding/exp_avg is [3], not [320, 16]",
    ),
    "count": (
        lambda d: rewritten(
            d, lambda s: s.update({"optimizer/embedding/step": torch.tensor(-1.0)})
        ),
        {},
        "embedding/step is -1.0, not a count",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    change, options, says = REFUSED[kind]
    assert train(tmp_path / "parent", steps=2, **CONSTANT) == 0
    parent = step(tmp_path / "parent", 2)
    change(parent)
    ask = CONSTANT | {"init": parent, "model": None, "steps": 1}
    assert train(tmp_path / "out", **ask | options, keep_optimizer=True) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("openpalm: error: --keep-optimizer: ")
    assert says in line
    # The same directory can be used without the option.
    assert train(tmp_path / "out", **ask) == 0


def test_the_moments_of_an_adapter_are_not_the_weights(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "parent", steps=2, **CONSTANT | {"lora.rank": 2}) == 0
    ask = CONSTANT | {"init": tmp_path / "parent", "model": None, "steps": 1}
    assert train(tmp_path / "out", **ask, keep_optimizer=True) == 2
    assert "has no optimizer state that fits this model" in capsys.readouterr().err


def test_it_needs_init(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(tmp_path / "out", keep_optimizer=True) == 2
    assert "--keep-optimizer: is for --init; leave it out" in capsys.readouterr().err


def test_the_last_blocks_alone_continue(train: Train, tmp_path: Path):
    assert train(tmp_path / "parent", steps=3, **CONSTANT) == 0
    ask = CONSTANT | {"init": tmp_path / "parent", "model": None, "steps": 1, "last_layers": 1}
    assert train(tmp_path / "out", **ask, keep_optimizer=True) == 0
    state = checkpoint.load_train_state(step(tmp_path / "out", 1)).tensors
    counts = {k: float(v) for k, v in state.items() if k.endswith("/step")}
    assert set(counts.values()) == {4.0}
    assert not any("embedding" in name for name in counts)


def test_parameters_without_weights_in_the_checkpoint_start_new():
    model = made(tiny())
    optimizer = Optimizer(model, OptimSettings(), 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0)
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    names = {name for name, _ in model.named_parameters()} - {"embedding"}
    other = Optimizer(made(tiny()), OptimSettings(), 0.01)
    assert other.take_over(state, names) == ["embedding"]
    assert same(
        other.state_tensors(), {k: v for k, v in state.items() if not k.startswith("embedding/")}
    )
