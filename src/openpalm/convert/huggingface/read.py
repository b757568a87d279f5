"""Reads a folder with an exported PaLM back; nothing in it is executed.

Reads config.json, generation_config.json, the safetensors files and the tokenizer's files. The
modelling file and everything else in the folder is ignored.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from openpalm.base.console import shown
from openpalm.base.json_file import read_json
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor, joined_rows
from openpalm.convert.gptj.huggingface import stored_tensors
from openpalm.convert.huggingface.names import configs_from_json, parts_of
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, DataError, SettingsError
from openpalm.generate.defaults import SamplingDefaults, sampling_defaults
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import make_model

CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_CONFIG_BYTES = 1 << 20
_REMEDY = "take another copy of the folder"


def read_palm(folder: Path) -> tuple[ModelConfig, RewardConfig | None, LazyState]:
    """The configs of a folder that `export` or `save_pretrained` wrote, and its tensors.

    The tensors have our names and are read on access. Raises CheckpointError with the file, the
    fault and the remedy.
    """
    where = str(folder / CONFIG_FILE)
    content = read_json(folder / CONFIG_FILE, _REMEDY, MAX_CONFIG_BYTES)
    try:
        config, reward = configs_from_json(content, where)
    except SettingsError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    return config, reward, _tensors(folder, config, reward)


def read_tokenizer(folder: Path) -> str | None:
    """The folder's tokenizer.json, with the end-of-text token that its other files name."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer.from_spec(str(folder), ()).definition
    except DataError as error:
        raise CheckpointError(str(error)) from None


def read_defaults(folder: Path) -> SamplingDefaults:
    """Sampling settings in generation_config.json; `do_sample: false` is temperature 0."""
    where = folder / "generation_config.json"
    if not where.is_file():
        return SamplingDefaults()
    if read_json(where, _REMEDY, MAX_CONFIG_BYTES).get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    return sampling_defaults(folder)


def _tensors(folder: Path, config: ModelConfig, reward: RewardConfig | None) -> LazyState:
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise CheckpointError(
            f"{folder}: holds no model.safetensors and no index of one; save it again with "
            "save_pretrained"
        )
    stored = stored_tensors(folder)
    # Before a model is made: a hostile config must not make one of a billion blocks.
    if config.depth > len(stored):
        raise CheckpointError(
            f"{folder}: holds {len(stored)} tensors, too few for its {CONFIG_FILE} "
            f"({config.depth} blocks)"
        )
    shapes = dict(_shapes(config, reward))
    parts = {name: parts_of(name, config, reward=reward is not None) for name in shapes}
    expected = {
        part.name: part.shape(shapes[name]) for name, each in parts.items() for part in each
    }
    _check(folder, {name: each.shape for name, each in stored.items()}, expected)
    entries: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        # Not stored, so zeros: padding rows, and the head that a reward model does not use.
        of_rows = [(part.rows, stored[part.name]) for part in parts[name]]
        dtype = of_rows[0][1].dtype if of_rows else torch.float32
        entries[name] = joined_rows(shape, dtype, of_rows)
    return LazyState(folder, entries)


def _shapes(
    config: ModelConfig, reward: RewardConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = make_model(config, reward)
    yield from ((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())


def _check(
    folder: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raises CheckpointError unless names and shapes are the expected ones."""
    odd = min((name for name, _ in found.items() ^ expected.items()), default=None)
    if odd is not None:
        is_, needs = found.get(odd), expected.get(odd)
        raise CheckpointError(
            f"{folder}: {shown(odd)} is {list(is_) if is_ else 'absent'}, but its {CONFIG_FILE} "
            f"needs {list(needs) if needs else 'no such tensor'}; {_REMEDY}"
        )
