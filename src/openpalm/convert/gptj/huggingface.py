"""GPT-J in Hugging Face's layout: reads and writes the folder that GPTJForCausalLM loads.

Reads safetensors and PyTorch files, whole or in shards with an index. Only config.json and tensors
are read; nothing that the folder brings along is executed.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpalm.base.console import shown
from openpalm.base.json_file import read_json
from openpalm.checkpoint import tensors
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor
from openpalm.convert.files import Hyperparameters, read_tensors
from openpalm.convert.gptj.names import (
    check_is_gptj,
    gptj_config,
    joined,
    part,
    part_shapes,
    parts_of,
)
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model.config import ModelConfig

MAX_SHARD_BYTES = 5 * 10**9
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_REMEDY = "take another copy of the folder"
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_BUFFERS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions|rotary_emb\..*)"
)
_PLAIN_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_OF_BLOCK = {
    "norm.weight": "ln_1.weight",
    "norm.bias": "ln_1.bias",
    "project_in.q": "attn.q_proj.weight",
    "project_in.k": "attn.k_proj.weight",
    "project_in.v": "attn.v_proj.weight",
    "project_in.up": "mlp.fc_in.weight",
    "project_in.up_bias": "mlp.fc_in.bias",
    "project_out.out": "attn.out_proj.weight",
    "project_out.down": "mlp.fc_out.weight",
    "project_out.down_bias": "mlp.fc_out.bias",
}
_OUTSIDE = {
    "embedding": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "unembedding": "lm_head.weight",
    "head_bias": "lm_head.bias",
}


def names_of(config: ModelConfig) -> dict[str, str]:
    """Part name -> tensor name of GPTJForCausalLM."""
    names = {
        f"blocks.{i}.{ours}": f"transformer.h.{i}.{theirs}"
        for i in range(config.depth)
        for ours, theirs in _OF_BLOCK.items()
    }
    names |= _OUTSIDE
    if config.tied:
        del names["unembedding"]
    return names


def read_gptj(folder: Path) -> tuple[ModelConfig, LazyState]:
    """The config of a GPT-J folder, and its tensors, read on access. Raises CheckpointError."""
    config = read_config(folder)
    stored = stored_tensors(folder)
    names, shapes = names_of(config), part_shapes(config)
    stored = {n: e for n, e in stored.items() if not _BUFFERS.fullmatch(n)}
    if config.tied:
        stored.pop("lm_head.weight", None)
    missing = [name for name in names.values() if name not in stored]
    unknown = stored.keys() - set(names.values())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"also holds {shown(min(unknown))}"
        raise CheckpointError(f"{folder}: {what}; its config.json is of another model")
    for ours, theirs in names.items():
        if stored[theirs].shape != shapes[ours]:
            raise CheckpointError(
                f"{folder}: {theirs} is {list(stored[theirs].shape)}, where its config.json says "
                f"{list(shapes[ours])}"
            )

    def read(name: str) -> Tensor:
        return stored[names[name]].read()

    return config, joined(folder, config, read, lambda name: stored[names[name]].dtype)


def read_config(folder: Path) -> ModelConfig:
    """The model that config.json describes. Raises CheckpointError for what we do not compute."""
    where = folder / "config.json"
    given = Hyperparameters(str(where), read_json(where, _REMEDY))
    sizes = {n: given.whole(n) for n in ("vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim")}
    if missing := [name for name, value in sizes.items() if value is None]:
        raise CheckpointError(f"{where}: lacks {', '.join(missing)}; {_REMEDY}")
    activation = given.values.get("activation_function", "gelu_new")
    if activation not in _TANH_GELU:
        raise CheckpointError(f"{where}: activation_function {shown(activation)} is not GPT-J's")
    vocab, dim, layers, heads, rotary = (value or 0 for value in sizes.values())
    if dim % heads:
        raise CheckpointError(f"{where}: n_head {heads} does not divide n_embd {dim}")
    try:
        return gptj_config(
            vocab_size=vocab,
            dim=dim,
            depth=layers,
            heads=heads,
            rotary_dims=rotary,
            context=given.whole("n_positions") or 2048,
            ff_dim=given.whole("n_inner") or 4 * dim,
            norm_eps=given.positive("layer_norm_epsilon", 1e-5),
            tied=given.flag("tie_word_embeddings", False),
        )
    except SettingsError as error:
        raise CheckpointError(f"{where}: {error}") from None


def stored_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a Hugging Face folder, of one file or of those that an index names."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _tensors_of(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(index)
    raise CheckpointError(f"{folder}: holds no {' or '.join(WEIGHT_FILES)}, nor an index of one")


def _indexed(index: Path) -> dict[str, LazyTensor]:
    places = read_json(index, _REMEDY).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map")
    files = set(places.values())
    for file in files:
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or file.startswith("."):
            raise CheckpointError(f"{index}: names {shown(file)}, which is no file of its folder")
    found: dict[str, LazyTensor] = {}
    for file in sorted(files):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent}: lacks {file}, which its index names")
        found |= {
            n: t for n, t in _tensors_of(index.parent / file).items() if places.get(n) == file
        }
    if missing := places.keys() - found.keys():
        raise CheckpointError(f"{index}: {shown(min(missing))} is not in the file that it names")
    return found


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".safetensors":
        return LazyState.of_file(path).entries
    whole = read_tensors(path)[0].left()
    prefix = "transformer." if not any(n.startswith("transformer.") for n in whole) else ""
    head = ("lm_head.",)
    return {
        (n if n.startswith(head) else prefix + n): LazyTensor(
            tuple(t.shape), t.dtype, lambda t=t: t.clone()
        )
        for n, t in whole.items()
    }


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of GPTJForCausalLM."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.dim,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": None if config.ff_dim == 4 * config.dim else config.ff_dim,
        "rotary_dim": config.rotated,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "torch_dtype": str(dtype)[6:],
    }


def check_writable(config: ModelConfig) -> None:
    """Raises CheckpointError for a model that GPTJForCausalLM cannot express."""
    check_is_gptj(config, "Hugging Face's GPT-J", embedding_bias=False)


def write_gptj(
    folder: Path, config: ModelConfig, state: LazyState, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes config.json and the weights, in shards with an index where they are large.

    Raises OSError.
    """
    entries = _foreign_entries(config, state)
    dtype = entries["transformer.wte.weight"].dtype
    text = json.dumps(config_json(config, dtype), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    write_shards(folder, LazyState(state.where, entries), max_shard_bytes)


def write_shards(folder: Path, state: LazyState, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes model.safetensors or, if it is larger, shards with an index. Raises OSError."""
    entries = state.entries
    shards = _shards_of(entries, max_shard_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        part = LazyState(state.where, {name: entries[name] for name in names})
        tensors.write_one_by_one(folder / file, part.layout, part.__getitem__, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(_bytes(entry) for entry in entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _foreign_entries(config: ModelConfig, state: LazyState) -> dict[str, LazyTensor]:
    owners = {part: ours for ours, parts in parts_of(config).items() for part in parts}
    shapes = part_shapes(config)

    def entry(name: str) -> LazyTensor:
        def read() -> Tensor:
            return part(config, state, name)

        return LazyTensor(shapes[name], state.entries[owners[name]].dtype, read)

    return {theirs: entry(ours) for ours, theirs in names_of(config).items()}


def _shards_of(entries: Mapping[str, LazyTensor], most: int) -> list[list[str]]:
    """Consecutive tensors, up to `most` bytes in each shard."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + _bytes(entry) > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(entry)
    return shards


def _bytes(entry: LazyTensor) -> int:
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize
