"""OpenPaLM: train a PaLM-style language model from text, fine-tune it, sample from it.

The names below are the public API. They are resolved on first use (PEP 562), so that
`import openpalm` is quick and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from openpalm.checkpoint.directory import load
    from openpalm.errors import OpenPalmError
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer

_HOME = {
    "load": "openpalm.checkpoint.directory",
    "ModelConfig": "openpalm.model.config",
    "OpenPalmError": "openpalm.errors",
    "Transformer": "openpalm.model.transformer",
}

__all__ = ["ModelConfig", "OpenPalmError", "Transformer", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'openpalm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
