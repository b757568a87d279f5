"""GPT-J in OpenPaLM's names: its config, and its tensors with keys and values apart.

Both foreign layouts store queries, keys and values as three matrices and the vocabulary without
padding. Here are the parts that they share: `part names` are OpenPaLM's, but for `k` and `v`, which
are the halves of OpenPaLM's `kv`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from openpalm.checkpoint.lazy_state import LazyState, LazyTensor, joined_rows
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig

VOCABULARY = ("embedding", "unembedding", "head_bias")
"""tensors with a row per token id"""


def gptj_config(
    *,
    vocab_size: int,
    dim: int,
    depth: int,
    heads: int,
    rotary_dims: int,
    context: int,
    ff_dim: int,
    norm_eps: float = 1e-5,
    embedding_bias: bool = False,
    tied: bool = False,
) -> ModelConfig:
    """The config of a GPT-J. Raises SettingsError for sizes that do not fit together."""
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=dim // heads,
        ff_dim=ff_dim,
        kv_heads=heads,
        context=context,
        feedforward="gelu",
        bias=True,
        embedding_bias=embedding_bias,
        tied=tied,
        rotary="interleaved",
        rotary_dims=rotary_dims,
        norm_eps=norm_eps,
    )


def is_gptj(config: ModelConfig) -> bool:
    """Whether GPTJForCausalLM computes this model's function."""
    return not _differences(config)


def check_is_gptj(config: ModelConfig, target: str, **more: object) -> None:
    """Raises CheckpointError, naming the settings, unless the model is of GPT-J's kind.

    more: further settings that `target` needs, by field of the config.
    """
    if odd := _differences(config, **more):
        raise CheckpointError(
            f"{target} holds models of GPT-J's kind only; this one has {', '.join(odd)}"
        )


def _differences(config: ModelConfig, **more: object) -> list[str]:
    wanted = {
        "feedforward": "gelu",
        "bias": True,
        "rotary": "interleaved",
        "rotary_base": 10000.0,
        "xpos_base": 0.0,
        "qk_norm": False,
        "causal": True,
        "norm_before_head": True,
        "logit_scale": 1.0,
        "kv_heads": config.heads,
        "head_dim": config.dim // config.heads,
        "dim": config.heads * config.head_dim,
    }
    found = {name: getattr(config, name) for name in wanted | more}
    return [f"{n} {found[n]}" for n, value in (wanted | more).items() if found[n] != value]


def parts_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The name of each OpenPaLM tensor -> the names of the parts that form its rows."""
    names: dict[str, tuple[str, ...]] = {"embedding": ("embedding",)}
    if config.embedding_bias:
        names["embedding_bias"] = ("embedding_bias",)
    for layer in range(config.depth):
        block = f"blocks.{layer}."
        for name in ("norm.weight", "norm.bias", "project_in.q"):
            names[block + name] = (block + name,)
        names[f"{block}project_in.kv"] = (f"{block}project_in.k", f"{block}project_in.v")
        for name in ("in.up", "in.up_bias", "out.out", "out.down", "out.down_bias"):
            names[f"{block}project_{name}"] = (f"{block}project_{name}",)
    ends = ["norm.weight", "norm.bias", "head_bias"] + ([] if config.tied else ["unembedding"])
    return names | {name: (name,) for name in ends}


def part_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each part, as OpenPaLM holds it: [out, in], without padding rows."""
    d, inner = config.dim, config.heads * config.head_dim
    of_block = {
        "norm.weight": (d,),
        "norm.bias": (d,),
        "project_in.q": (inner, d),
        "project_in.k": (inner, d),
        "project_in.v": (inner, d),
        "project_in.up": (config.ff_dim, d),
        "project_in.up_bias": (config.ff_dim,),
        "project_out.out": (d, inner),
        "project_out.down": (d, config.ff_dim),
        "project_out.down_bias": (d,),
    }
    whole: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab_size, d),
        "embedding_bias": (d,),
        "unembedding": (config.vocab_size, d),
        "head_bias": (config.vocab_size,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    shapes = {f"blocks.{i}.{n}": s for i in range(config.depth) for n, s in of_block.items()}
    return whole | shapes


def joined(
    where: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    dtype: Callable[[str], torch.dtype],
    suffix: str = "",
) -> LazyState:
    """OpenPaLM's tensors from parts: keys and values joined, the vocabulary padded with zeros.

    read: gives a part; dtype: its type; suffix: added to every name.
    """
    shapes = part_shapes(config)

    def entry(name: str, parts: tuple[str, ...]) -> LazyTensor:
        of_rows: list[tuple[slice, LazyTensor]] = []
        start = 0
        for part in parts:
            end = start + shapes[part][0]
            stored = LazyTensor(shapes[part], dtype(part), partial(read, part))
            of_rows.append((slice(start, end), stored))
            start = end
        rows = config.padded_vocab if name in VOCABULARY else start
        return joined_rows((rows, *shapes[parts[0]][1:]), dtype(parts[0]), of_rows)

    entries = {name + suffix: entry(name, parts) for name, parts in parts_of(config).items()}
    return LazyState(where, entries)


def part(config: ModelConfig, state: Mapping[str, Tensor], name: str, suffix: str = "") -> Tensor:
    """One part of OpenPaLM's tensors, the inverse of `joined`."""
    if name.endswith(("project_in.k", "project_in.v")):
        keys, values = state[f"{name[:-1]}kv{suffix}"].chunk(2)
        return keys if name.endswith("k") else values
    tensor = state[name + suffix]
    return tensor[: config.vocab_size] if name in VOCABULARY else tensor


def without_embedding_bias(config: ModelConfig, state: LazyState) -> tuple[ModelConfig, LazyState]:
    """The same function with the embedding bias added to every row of the table.

    Raises CheckpointError for a tied head, which the sum would change.
    """
    if not config.embedding_bias:
        return config, state
    if config.tied:
        raise CheckpointError("an embedding bias cannot be added to a table that the head shares")
    entries = dict(state.entries)
    table = entries["embedding"]
    del entries["embedding_bias"]

    def read() -> Tensor:
        rows = state["embedding"].float()
        rows[: config.vocab_size] += state["embedding_bias"].float()
        return rows.to(table.dtype)

    entries["embedding"] = LazyTensor(table.shape, table.dtype, read)
    return replace(config, embedding_bias=False), LazyState(state.where, entries)
