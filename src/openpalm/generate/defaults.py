"""Default sampling settings of a model: temperature, top-p and top-k for requests that set none.

`sample`, `chat`, the HTTP API and the chat page all use them.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import yaml

from openpalm.errors import CheckpointError, one_line

MAX_BYTES = 1 << 20
_BOUNDS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "top_k": (0, 2**31)}


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling settings of a model."""

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens"""

    def override(self, temperature: float | None, top_p: float | None, top_k: int | None) -> Self:
        """These settings, replaced by those that a user set."""
        chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        return replace(self, **{name: v for name, v in chosen.items() if v is not None})


def sampling_defaults(
    directory: Path, otherwise: SamplingDefaults | None = None
) -> SamplingDefaults:
    """Reads the settings of a checkpoint directory from the first file that has any of them.

    The files: generation_config.json in the checkpoint or its run, as Hugging Face writes it; then
    the YAML header of card.md (`inference: parameters: temperature: 0.7`) in either. If none has
    any, returns `otherwise`. Raises CheckpointError for a file that cannot be read or a value out
    of bounds.
    """
    folders = [directory]
    if directory.parent.name == "checkpoints":
        folders.append(directory.parent.parent)
    sources = [(folder / "generation_config.json", _json_settings) for folder in folders]
    sources += [(folder / "card.md", _card_settings) for folder in folders]
    for path, read in sources:
        try:
            settings = read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = one_line(error, 200)
            raise CheckpointError(f"{path}: cannot be read ({reason})") from None
        known = {name: settings[name] for name in _BOUNDS if settings.get(name) is not None}
        if known:
            checked = {name: _checked(path, name, value) for name, value in known.items()}
            return SamplingDefaults(**checked)
    return otherwise or SamplingDefaults()


def _text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes")
    return text


def _json_settings(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(_text(path)))


def _card_settings(path: Path) -> dict[str, Any]:
    sections = _text(path).split("---\n", 2)
    if len(sections) < 3 or sections[0].strip():
        return {}
    inference = _mapping(yaml.safe_load(sections[1]) or {}).get("inference")
    if not isinstance(inference, dict):  # cards may have `inference: false`
        return {}
    return _mapping(cast(dict[str, Any], inference).get("parameters") or {})


def _mapping(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("must be a mapping of settings")
    return cast(dict[str, Any], content)


def _checked(path: Path, name: str, value: object) -> Any:
    low, high = _BOUNDS[name]
    types = (int,) if name == "top_k" else (int, float)
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or not low <= cast(float, value) <= high or (name == "top_p" and value == 0):
        shown = repr(value)[:40] if isinstance(value, str | int | float) else "not a number"
        raise CheckpointError(f"{path}: {name} is {shown}; it must be from {low} to {high}")
    return value
