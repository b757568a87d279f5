"""OpenPaLM: train a PaLM-style language model from text, align it, serve it.

The names in __all__ are the public API; docs/python.md describes them. Each is imported on first
use (PEP 562), so that `import openpalm` is quick and imports no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0"

if TYPE_CHECKING:
    from openpalm.api import convert, generate, load, score, train
    from openpalm.data.rows.preferences import Preference
    from openpalm.errors import OpenPalmError
    from openpalm.model.config import ModelConfig
    from openpalm.model.transformer import Transformer

__all__ = [
    "ModelConfig",
    "OpenPalmError",
    "Preference",
    "Transformer",
    "__version__",
    "convert",
    "generate",
    "load",
    "score",
    "train",
]

_MODULES = {
    "ModelConfig": "openpalm.model.config",
    "OpenPalmError": "openpalm.errors",
    "Preference": "openpalm.data.rows.preferences",
    "Transformer": "openpalm.model.transformer",
    "load": "openpalm.api",
    "score": "openpalm.api",
}
_CALLABLE_PACKAGES = ("convert", "generate", "train")
"""Packages with the name of a function of openpalm.api: calling the package calls the function."""


class _CallablePackage(ModuleType):
    @property
    def __wrapped__(self) -> Any:  # inspect.signature reads the function here
        return getattr(import_module("openpalm.api"), self.__name__.removeprefix("openpalm."))

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__(*args, **options)


class _OpenPalm(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets every imported package as an attribute of this module.
        if name in _CALLABLE_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _OpenPalm


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"openpalm.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'openpalm' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
