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
    "2x2": (4, {"shard": 2, "replicate": 2}),
    "pipeline": (2, {"pipeline": 2}),
}
STEPS = 3


def saved(parallel: dict[str, Any], folder: Path, optimizer: str) -> tuple[float, dict[str, Any]]:
    """Trains and saves; then the loss of the next step, and the state that was saved."""
    trainer = trainer_for(parallel, optimizer=optimizer)
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
    trainer = trainer_for(parallel, optimizer=optimizer)
    checkpoint.load_weights(trainer.model, folder)
    state = checkpoint.load_train_state(folder, checked=trainer.world.size > 1)
    trainer.restore(state.tensors, state.values)
    tensors, _ = trainer.state()
    loaded = weights(trainer) | {name: whole(t).clone() for name, t in tensors.items()}
    return trainer.train_step().loss, loaded


def merged(results: list[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """The state of all pipeline stages."""
    return {name: tensor for _, state in results for name, tensor in state.items()}


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float, dict]]:
    found = {}
    for name, (size, parallel) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name) / "step-00000003"
        results = on_ranks(size, saved, parallel, folder, "adamw")
        found[name] = folder, results[0][0], merged(results)
    return found


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("of", LAYOUTS)
def test_every_layout_continues_every_other(saves: dict[str, Any], of: str, to: str):
    assert CONFIG.padded_vocab % 3, "a vocabulary that not every number of processes divides"
    folder, loss, state = saves[of]
    size, parallel = LAYOUTS[to]
    results = on_ranks(size, continued, parallel, folder, "adamw")
    assert len({found for found, _ in results}) == 1
    found, loaded = results[0][0], merged(results)
    assert found == pytest.approx(loss, rel=1e-5)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_every_layout_writes_a_checkpoint_of_one_process(saves: dict[str, Any]):
    for folder, _, state in saves.values():
        model = checkpoint.load(folder)
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], state[name]) for name in own)
