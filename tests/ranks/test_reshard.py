"""Checkpoints saved on one layout and continued on any other.

The next step's loss agrees to 1e-5 (relative) with that of the layout that saved; on the same
layout weights and optimizer state are equal bit for bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import CONFIG, trainer_for, weights

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.contents import TrainState, collect
from openpalm.checkpoint.saver import Saver
from openpalm.model.sharding import whole
from ranks import on_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "2": (2, {}),
    "4": (4, {}),
    "tensor-2": (2, {"tensor": 2}),
    "tensor-2x2": (4, {"tensor": 2, "shard": 2}),
    "2x2": (4, {"shard": 2, "replicate": 2}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "3": (3, {}),
    "8": (8, {}),
    "replicas": (2, {"shard": 1}),
    "2x4": (8, {"shard": 4, "replicate": 2}),
    "context": (2, {"context": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "pipeline-2x2": (4, {"pipeline": 2, "schedule": "interleaved"}),
}
"""With all of LAYOUTS: only `make ranks` has the time."""
ALL = LAYOUTS | MORE
PAIRS = [
    pytest.param(of, to, marks=() if {of, to} <= LAYOUTS.keys() else pytest.mark.whole)
    for of in ALL
    for to in ALL
]
STEPS = 3
BATCH: dict[str, Any] = {"sequences": 24, "accumulation": 2}


def saved(parallel: dict[str, Any], folder: Path, optimizer: str) -> tuple[float, dict[str, Any]]:
    """Trains and saves; then the loss of the next step, and the state that was saved."""
    trainer = trainer_for(parallel, optimizer=optimizer, **BATCH)
    for _ in range(STEPS):
        trainer.train_step()
    tensors, values = trainer.state()
    contents = collect(trainer.model, train=TrainState(tensors, values))
    saver = Saver(trainer.world)
    saver.save(folder, contents, {"step": STEPS})
    state = weights(trainer) | {name: whole(t).clone() for name, t in tensors.items()}
    saver.wait()
    return trainer.train_step().loss, state


def continued(parallel: dict[str, Any], folder: Path, optimizer: str) -> tuple[float, Any]:
    """The loss of the next step of a trainer that loads the checkpoint, and what it loaded."""
    trainer = trainer_for(parallel, optimizer=optimizer, **BATCH)
    checkpoint.load_weights(trainer.model, folder)
    state = checkpoint.load_train_state(folder, checked=trainer.world.size > 1)
    trainer.restore(state.tensors, state.values)
    tensors, _ = trainer.state()
    loaded = weights(trainer) | {name: whole(t).clone() for name, t in tensors.items()}
    return trainer.train_step().loss, loaded


def merged(results: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """The state of all pipeline stages."""
    return {name: tensor for _, state in results for name, tensor in state.items()}


class Saves:
    """A checkpoint of each layout, made when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory):
        self.factory = factory
        self.made: dict[str, tuple[Path, float, dict[str, Any]]] = {}

    def of(self, name: str) -> tuple[Path, float, dict[str, Any]]:
        if name not in self.made:
            folder = self.factory.mktemp(name) / "step-00000003"
            size, parallel = ALL[name]
            results = on_ranks(size, saved, parallel, folder, "adamw")
            self.made[name] = folder, results[0][0], merged(results)
        return self.made[name]


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    return Saves(tmp_path_factory)


@pytest.mark.parametrize(("of", "to"), PAIRS)
def test_every_layout_continues_every_other(saves: Saves, of: str, to: str):
    assert CONFIG.padded_vocab % 3, "a vocabulary that not every number of processes divides"
    folder, loss, state = saves.of(of)
    size, parallel = ALL[to]
    results = on_ranks(size, continued, parallel, folder, "adamw")
    assert len({found for found, _ in results}) == 1
    found, loaded = results[0][0], merged(results)
    assert found == pytest.approx(loss, rel=1e-5)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_a_checkpoint_of_one_process(saves: Saves, name: str):
    folder, _, state = saves.of(name)
    own = dict(checkpoint.load(folder).named_parameters())
    assert all(torch.equal(own[name], state[name]) for name in own)
