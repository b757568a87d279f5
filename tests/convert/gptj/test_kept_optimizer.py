"""Fine-tuning continues from the moments of a full checkpoint of mesh-transformer-jax."""

from pathlib import Path

import pytest
import torch

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.convert.gptj.mesh_read import read_mesh
from openpalm.errors import SettingsError
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.inherited_optimizer import check_optimizer, inherit_optimizer
from openpalm.train.optimization.parameter_groups import Optimizer

ROTO = Path(__file__).parents[2] / "parity/data/mesh-transformer-jax/roto"


def test_keep_optimizer_takes_them_over(tmp_path: Path):
    assert main(["convert", str(ROTO / "full"), str(tmp_path / "ours")]) == 0
    model = checkpoint.load(tmp_path / "ours").requires_grad_(True)
    optimizer = Optimizer(model, OptimSettings(), 1e-3)
    inherit_optimizer(optimizer, tmp_path / "ours", "train")
    state = optimizer.state_tensors()
    moments = read_mesh(ROTO / "full").moments
    assert moments is not None
    assert state.keys() == set(moments)
    assert all(torch.equal(state[name].float(), moments[name]) for name in moments)
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "exp_avg" in name)


def test_a_slim_checkpoint_has_none(tmp_path: Path):
    assert main(["convert", str(ROTO / "slim"), str(tmp_path / "ours")]) == 0
    with pytest.raises(SettingsError, match="holds no optimizer state"):
        check_optimizer(checkpoint.resolve(tmp_path / "ours"), OptimSettings())
