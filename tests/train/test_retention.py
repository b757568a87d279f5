"""Which checkpoints a run keeps: the newest, multiples, the best; and the link to the best."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import saver
from openpalm.checkpoint.manifest import read_manifest, verify
from openpalm.cli.main import main
from openpalm.evaluate import probes
from openpalm.evaluate.perplexity import SplitLoss
from openpalm.train import retention
from openpalm.train.logging.metrics import read_rows
from openpalm.train.probes import BestBy

Train = Callable[..., int]
LOSSES = {1: 5.0, 2: 4.0, 3: 2.0, 4: 3.0, 5: 1.0, 6: 3.5, 7: 1.0, 8: 2.5}
"""Validation loss at each step: the best is step 3, then step 5."""
EACH = {"eval_every": 1, "save_every": 2, "keep_checkpoints": 1}


class Killed(BaseException):
    """Ends a run without any of its care, as SIGKILL would."""


def kept(run: Path) -> list[int]:
    return sorted(retention.saved_steps(run))


def best(run: Path) -> Path:
    return run / "checkpoints" / "best"


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives a run the validation losses of LOSSES from a step on."""

    def begin(step: int) -> None:
        values: Iterator[float] = iter([LOSSES[n] for n in range(step, 9)])
        loss = lambda *_, **__: SplitLoss(next(values), 1, 1)  # noqa: E731
        monkeypatch.setattr(probes, "dataset_loss", loss)

    begin(1)
    return begin


@pytest.mark.parametrize(("every", "left"), [(2, [2, 4, 6, 8]), (5, [5, 8]), (3, [3, 6, 8])])
def test_multiples_are_saved_and_never_removed(
    train: Train, tmp_path: Path, every: int, left: list[int]
):
    assert train(tmp_path / "run", keep_checkpoints=1, keep_every=every) == 0
    assert kept(tmp_path / "run") == left


def test_the_best_is_kept_and_linked(train: Train, tmp_path: Path, losses: object):
    assert train(tmp_path / "run", **EACH, keep_best=True) == 0
    assert kept(tmp_path / "run") == [5, 8]
    assert checkpoint.resolve(best(tmp_path / "run")).name == "step-00000005"
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000008", "the newest is resumed"


def test_without_the_option_it_is_not_kept(train: Train, tmp_path: Path, losses: object):
    assert train(tmp_path / "run", **EACH) == 0
    assert kept(tmp_path / "run") == [8]
    assert not best(tmp_path / "run").is_symlink()


def test_the_result_is_the_same(train: Train, tmp_path: Path, losses: Callable[[int], None]):
    assert train(tmp_path / "plain", **EACH) == 0
    losses(1)
    assert train(tmp_path / "kept", **EACH, keep_best=True, keep_every=3) == 0
    runs = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "kept")]
    a, b = ([row.get("loss") for row in found] for found in runs)
    assert a == b


KILLS: dict[str, tuple[object, str, str, str]] = {
    "before the new best is saved": (saver, "complete_or_absent", "step-00000005", "step-00000003"),
    "before the link is changed": (retention, "link_best", "step-00000005", "step-00000003"),
    "before the old best is removed": (shutil, "rmtree", "step-00000003", "step-00000005"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_leaves_the_best_whole(
    train: Train,
    tmp_path: Path,
    losses: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
):
    run = tmp_path / "run"
    where, name, at, stays = KILLS[moment]
    original = getattr(where, name)

    def killed(path: Path, *more: Any, **named: Any) -> Any:
        reached = more[0] == 5 if name == "link_best" else path.name == at
        if reached:
            raise Killed
        return original(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        with pytest.raises(Killed):
            train(run, **EACH, keep_best=True)
    directory = checkpoint.resolve(best(run), training=True)
    assert directory.name == stays
    verify(directory)
    losses(max(kept(run)) + 1)
    assert train(run, **EACH, keep_best=True) == 0
    assert kept(run) == [5, 8]
    assert checkpoint.resolve(best(run)).name == "step-00000005"
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_damaged_best_is_no_longer_linked(
    train: Train, tmp_path: Path, losses: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(retention, "prune", lambda *_: None)
        assert train(run, **EACH, keep_best=True) == 0
    for step in (5, 6, 8):
        shutil.rmtree(run / "checkpoints" / checkpoint.step_name(step))
    (run / "checkpoints" / checkpoint.step_name(5)).mkdir()
    losses(5)
    assert train(run, **EACH, keep_best=True) == 0
    assert checkpoint.resolve(best(run)).name == "step-00000005"


def test_the_best_is_used_by_name(train: Train, tmp_path: Path, losses: Callable[[int], None]):
    assert train(tmp_path / "run", **EACH, keep_best=True) == 0
    name = str(best(tmp_path / "run"))
    assert main(["sample", name, "the model", "--max-new-tokens", "4"]) == 0
    losses(1)
    assert train(tmp_path / "more", model=None, init=name, steps=1) == 0
    more = checkpoint.resolve(tmp_path / "more")
    best_hash = read_manifest(checkpoint.resolve(best(tmp_path / "run")))["sha256"]
    assert read_manifest(more)["lineage"]["parent"] == best_hash


def test_another_choice_when_resumed(
    train: Train, tmp_path: Path, losses: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    """A run that is resumed without the option has no link to a checkpoint that it removes."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(retention, "prune", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(run, **EACH, keep_best=True)
    assert best(run).is_symlink()
    losses(2)
    assert train(run, **EACH) == 0
    assert kept(run) == [8]
    assert not best(run).is_symlink()


def row(step: int, value: object) -> dict[str, Any]:
    return {"step": step, "val_loss": value}


def test_what_is_best():
    by = BestBy()
    rows = [{"step": 1, "loss": 0.1}, row(1, math.nan), row(2, 3.0), row(3, 0.0), row(4, 0.0)]
    assert by.step(rows, {1, 2, 3, 4}) == 3
    assert by.step(rows, {1, 2}) == 2
    assert by.step(rows, {1}) is None
    assert by.step([row(1, None), row(2, "low")], {1, 2}) is None
    assert BestBy(highest=True).step(rows, {2, 3, 4}) == 2
    assert by.step(rows, {2, 3, 4}, lambda seen: "late" if seen[-1]["step"] > 2 else None) == 2
