"""GPT-J in Hugging Face's layout: reads and writes the folder that GPTJForCausalLM loads.

Reads safetensors and PyTorch files, whole or in shards with an index. Only config.json and tensors
are read; nothing that the folder brings along is executed.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpalm.base.console import shown
from openpalm.base.json_file import read_json
from openpalm.checkpoint.lazy_state import LazyState, LazyTensor
from openpalm.checkpoint.streamed_logits import streamed_logits
from openpalm.convert.files import Hyperparameters, read_tensors
from openpalm.convert.gptj.names import (
    check_is_gptj,
    gptj_config,
    joined,
    part,
    part_shapes,
    parts_of,
)
from openpalm.convert.shard_files import MAX_SHARD_BYTES, filled_shards
from openpalm.errors import CheckpointError, SettingsError
from openpalm.model.config import ModelConfig

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
    # Before the names of all layers are made: a hostile config must not fill the memory.
    if config.depth > len(stored):
        raise CheckpointError(
            f"{folder}: holds {len(stored)} tensors, too few for the {config.depth} layers of its "
            "config.json; it is of another model"
        )
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
    names = ("vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim")
    vocab, dim, layers, heads, rotary = given.required(*names, remedy=_REMEDY)
    activation = given.values.get("activation_function", "gelu_new")
    if activation not in _TANH_GELU:
        raise CheckpointError(f"{where}: activation_function {shown(activation)} is not GPT-J's")
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
    for file in places.values():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or file.startswith("."):
            raise CheckpointError(f"{index}: names {shown(file)}, which is no file of its folder")
    files = set(places.values())
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
        # Not GPT-2's, which transformers assumes; the tokenizer's are filled in where there is one.
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
        "torch_dtype": str(dtype)[6:],
    }


def check_writable(config: ModelConfig) -> None:
    """Raises CheckpointError for a model that GPTJForCausalLM cannot express."""
    check_is_gptj(config, "Hugging Face's GPT-J", embedding_bias=False)


def write_gptj(
    folder: Path,
    config: ModelConfig,
    state: LazyState,
    ids: Tensor,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Tensor:
    """Writes config.json and the weights.

    Returns the logits of `ids` [batch, time], computed in the same pass. Raises OSError.
    """
    names, owners = names_of(config), parts_of(config)
    shapes = part_shapes(config)
    layout = {
        names[part]: (shapes[part], state.entries[ours].dtype)
        for ours, parts in owners.items()
        for part in parts
    }
    content = config_json(config, layout["transformer.wte.weight"][1])
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    with filled_shards(folder, layout, max_shard_bytes) as fill:

        def put(ours: str, tensor: Tensor) -> None:
            for name in owners[ours]:
                fill(names[name], part(config, {ours: tensor}, name))

        return streamed_logits(config, state.copied_to(put), ids)
