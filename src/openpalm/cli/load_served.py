"""Loads the models of `openpalm serve`: a base model and its adapters, at the start and later."""

import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.common import adapter_factors, load_to_serve, weights_path
from openpalm.cli.serve import ServeSettings, run_name
from openpalm.generate.adapters import pack
from openpalm.generate.defaults import sampling_defaults
from openpalm.model.config import LoraConfig
from openpalm.serve.worker import ServedModel

Factors = tuple[Path, LoraConfig, dict[str, Tensor]]
"""Directory, config and factors of an adapter."""


def first_models(settings: ServeSettings) -> list[ServedModel]:
    """The model of the command line, then its adapters. Raises OpenPalmError."""
    directory = checkpoint.resolve(weights_path(settings.path), training=settings.verify)
    # Before the model, which may take minutes: a wrong adapter is reported at once.
    read = {
        name: adapter_factors(Path(path), directory, force=settings.force)
        for name, path in settings.adapters.items()
    }
    base = _model(settings, directory, settings.path, settings.model_name, _warn)
    return [base, *(_over(base, settings.adapters[name], name, read[name]) for name in read)]


def load_model(settings: ServeSettings, path: str, name: str | None) -> ServedModel:
    """Another model, which replaces the first. Raises OpenPalmError."""
    directory = checkpoint.resolve(weights_path(path), training=settings.verify)
    return _model(settings, directory, path, name or run_name(path))


def load_adapter(
    settings: ServeSettings, base: ServedModel, path: str, name: str | None
) -> ServedModel:
    """An adapter over a served model. Raises OpenPalmError."""
    assert base.directory is not None
    factors = adapter_factors(Path(path), base.directory, force=settings.force)
    return _over(base, path, name or run_name(path), factors)


def _model(
    settings: ServeSettings,
    directory: Path,
    path: str,
    name: str,
    allow: Callable[[str], None] | None = None,
) -> ServedModel:
    engine, tokenizer, defaults = load_to_serve(
        directory, settings, slots=settings.max_sequences, allow=allow
    )
    return ServedModel(name, engine, tokenizer, path, defaults, directory=directory)


def _over(base: ServedModel, path: str, name: str, factors: Factors) -> ServedModel:
    directory, config, tensors = factors
    adapter = pack(base.engine.model, config, tensors)
    # The adapter of a run is a folder of the run's checkpoint, which has the settings.
    inside = (directory.parent / "manifest.json").is_file()
    defaults = sampling_defaults(directory.parent if inside else directory, base.defaults)
    return ServedModel(name, base.engine, base.tokenizer, path, defaults, adapter=adapter)


def _warn(reason: str) -> None:
    print(f"warning: {reason}; requests that meet them get status 503", file=sys.stderr)
