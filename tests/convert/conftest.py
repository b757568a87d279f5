"""A foreign checkpoint of small size, and the parity data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openpalm.convert.palm_rlhf.write import write_palm_rlhf
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

DATA = Path(__file__).parent.parent / "parity" / "data"

CONFIG = ModelConfig(
    vocab_size=70, dim=8, depth=2, heads=2, head_dim=4, ff_dim=16, xpos_base=512.0, context=2048
)


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval().requires_grad_(False)
    initialise(model, 0)
    model.embedding[config.vocab_size :] = 0
    return model


@pytest.fixture(scope="session")
def data() -> Path:
    return DATA


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture
def model() -> Callable[[ModelConfig], Transformer]:
    return random_model


@pytest.fixture
def palm() -> dict[str, Tensor]:
    """A palm-rlhf-pytorch state dict of the newest era, with gammas a little off zero."""
    _, state, _ = write_palm_rlhf(CONFIG, random_model(CONFIG).state_dict())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("gamma"):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return state


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes anything with torch.save and gives the path."""

    def save(content: object, name: str = "palm.pt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save
