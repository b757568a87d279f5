"""Named tensors in a file: what goes in comes out, and other libraries read the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import BASE, make
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import tensors
from openpalm.checkpoint.contents import TrainState
from openpalm.errors import CheckpointError
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimizer_settings import OptimizerName, OptimSettings


def back(path: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is read, after a look at it with safetensors' own reader."""
    tensors.write(path, given)
    with tensors.opened(path) as file:
        assert file.shapes() == {name: tuple(tensor.shape) for name, tensor in given.items()}
    assert same(load_file(path), given)
    return dict(tensors.StoredTensors(path))


def same(found: dict[str, Tensor], given: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and every bit, those of NaN too."""
    return found.keys() == given.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and bits(found[name]) == bits(tensor)
        for name, tensor in given.items()
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def everything() -> dict[str, Tensor]:
    """Every dtype with no, one and several dimensions, and views that are not contiguous."""
    drawn = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 100 - 20
    given: dict[str, Tensor] = {}
    for dtype in DTYPES:
        table = drawn.to(dtype)
        given |= {f"{dtype}/table": table.clone(), f"{dtype}/one": table[1, 2].clone()}
        given |= {f"{dtype}/empty": table[:0].clone(), f"{dtype}/turned": table.clone().T}
        given |= {f"{dtype}/every second": table.clone()[:, ::2]}
    given["repeated"] = drawn[:, :1].clone().expand(3, 4)
    given["not finite"] = torch.tensor([float("nan"), float("inf"), -0.0])
    given["random"] = torch.get_rng_state()
    given["parameter"] = torch.nn.Parameter(drawn.clone())
    return given


def test_every_kind_of_tensor_comes_back(tmp_path: Path):
    assert same(back(tmp_path / "a.safetensors", everything()), everything())


def test_tensors_that_share_memory_come_back(tmp_path: Path):
    """The same one twice, two views that overlap, two that do not, two shapes of one."""
    whole = torch.arange(12.0)
    given = {"whole": whole, "again": whole, "begin": whole[:8], "end": whole[4:]}
    given |= {"table": whole.view(3, 4), "turned": whole.view(3, 4).T, "last": whole[11]}
    found = back(tmp_path / "a.safetensors", given)
    assert same(found, given)
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path):
    given = {"a": torch.arange(100_000.0), "b": torch.ones(3)}
    checkpoint.save(tmp_path / "step", make(BASE), train=TrainState(given, {}))
    found = checkpoint.load_train_state(tmp_path / "step").tensors
    path = tmp_path / "step" / "train" / "state.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert same(dict(found), given)
    path.write_bytes(b"")
    assert same(dict(found), given)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "stable-adamw"])
def test_what_the_optimizers_hold_comes_back(name: OptimizerName, tmp_path: Path):
    model = make(BASE).requires_grad_(True)
    optimizer = Optimizer(model, OptimSettings(name=name), lr=0.01)
    for step in range(2):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1) * (number + 1))
        optimizer.step(1.0)
    state = optimizer.state_tensors()
    assert state
    storages = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(storages)) == len(storages)  # nothing is written twice
    assert same(back(tmp_path / "a.safetensors", state), state)


def test_torch_distributed_checkpoint_reads_the_same_file(tmp_path: Path):
    """So that several processes can each load their part of what one has saved."""
    given = everything()
    tensors.write(tmp_path / "state.safetensors", given)
    found = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in given.items()}
    reader = HuggingFaceStorageReader(str(tmp_path))
    state_dict_loader.load(found, storage_reader=reader, no_dist=True)
    assert same(found, given)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite(number: float, dtype: torch.dtype, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    tensors.write(path, {"good": torch.ones(9), "bad": torch.tensor([1.0, number]).to(dtype)})
    said: list[str] = []
    with tensors.opened(path) as file:
        assert file.finite("good", said.append).tolist() == [1.0] * 9
        with pytest.raises(
            CheckpointError, match=r"a\.safetensors: bad holds numbers that are not"
        ):
            file.finite("bad")
        assert len(file.finite("bad", said.append)) == 2
    assert len(said) == 1


def test_a_name_that_is_not_there(tmp_path: Path):
    tensors.write(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    with (
        pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be read"),
        tensors.opened(tmp_path / "a.safetensors") as file,
    ):
        file.tensor("b")
