"""How tokens are chosen where nobody says: by the model's own settings, else by one default.

`sample`, `chat`, the HTTP API and its page all take them from here.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import yaml

from openpalm.errors import CheckpointError

MAX_BYTES = 1 << 20
_BOUNDS = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "top_k": (0, 2**31)}


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling settings of a model."""

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all"""

    def given(self, temperature: float | None, top_p: float | None, top_k: int | None) -> Self:
        """These, with what a user set in their place."""
        chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        return replace(self, **{name: v for name, v in chosen.items() if v is not None})


def sampling_defaults(directory: Path) -> SamplingDefaults:
    """Those of a checkpoint directory: of the first of these that names any of them.

    generation_config.json beside the weights or in the run, as Hugging Face writes it; the head of
    card.md (`inference: parameters: temperature: 0.7` between two lines of ---). Raises
    CheckpointError for one that cannot be read or a value out of bounds.
    """
    folders = [directory]
    if directory.parent.name == "checkpoints":
        folders.append(directory.parent.parent)
    sources = [(folder / "generation_config.json", _json_settings) for folder in folders]
    sources += [(folder / "card.md", _card_settings) for folder in folders]
    for path, read in sources:
        try:
            found = read(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: cannot be read ({said})") from None
        known = {name: found[name] for name in _BOUNDS if found.get(name) is not None}
        if known:
            return SamplingDefaults(
                **{name: _checked(path, name, value) for name, value in known.items()}
            )
    return SamplingDefaults()


def _text(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError("too large for what it should hold")
    return text


def _json_settings(path: Path) -> dict[str, Any]:
    return _object(json.loads(_text(path)))


def _card_settings(path: Path) -> dict[str, Any]:
    parts = _text(path).split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    head = _object(yaml.safe_load(parts[1]) or {})
    inference = head.get("inference")
    if not isinstance(inference, dict):  # it may be a boolean
        return {}
    return _object(cast(dict[str, Any], inference).get("parameters") or {})


def _object(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("must hold named settings")
    return cast(dict[str, Any], content)


def _checked(path: Path, name: str, value: object) -> Any:
    low, high = _BOUNDS[name]
    kinds = (int,) if name == "top_k" else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not low <= cast(float, value) <= high or (name == "top_p" and value == 0):
        said = repr(value)[:40] if isinstance(value, str | int | float) else "no number"
        raise CheckpointError(f"{path}: {name} is {said}; it must be from {low} to {high}")
    return value
