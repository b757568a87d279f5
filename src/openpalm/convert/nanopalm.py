"""Converts nanoPALM checkpoints, with the same logits.

How nanoPALM's norms are folded: a block has two norms of the same input, mqa_ln for attention and
mlp_ln for the feed-forward layer, that differ only in their scales. Each scale is multiplied into
the columns of the matrix that reads it (c_attn, mlp.fc), and the one norm of our block has scale 1.
Its rotary embedding cannot be folded: it stays as rotary=nanopalm.
"""

from typing import Any

import torch
from torch import Tensor

from openpalm.convert.conversion import Converted, pad_vocabulary
from openpalm.convert.files import Hyperparameters, PaLMConfig, Tensors
from openpalm.errors import CheckpointError
from openpalm.model.config import ModelConfig

_SIZES = frozenset({"n_embed", "n_head", "vocab_size", "n_layer"})


def read_nanopalm(tensors: Tensors, given: Hyperparameters, outside: dict[str, Any]) -> Converted:
    """Converts nanoPALM's state dict; `outside` has the other values of its ckpt.pt, if any.

    Raises CheckpointError if the tensors contradict each other, `given` or the format.
    """
    config = _config(tensors, given, outside)
    table = tensors.take("decoder.word_embds.weight", config.vocab_size, config.dim)
    if "ln_vocab.weight" in tensors:
        head = tensors.take("ln_vocab.weight", config.vocab_size, config.dim)
        if not torch.equal(head, table):
            raise CheckpointError(
                f"{tensors.where}: ln_vocab.weight and decoder.word_embds.weight differ, but "
                "the original ties them"
            )
    state = {"embedding": pad_vocabulary(table, config)}
    for i in range(config.depth):
        parts = _block(tensors, f"decoder.blocks.{i}.", config)
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
    state["norm.weight"] = tensors.take("decoder.out_ln.weight", config.dim)
    tensors.finish()
    source = "the checkpoint" if _arguments(tensors, outside) else "the tensors' shapes"
    notes = [
        f"hyperparameters from {given.where if given.values else source}: dim {config.dim}, "
        f"depth {config.depth}, heads {config.heads} x {config.head_dim}, hidden {config.ff_dim}",
        "folded: both norms' scales into the matrices they feed; rows split; "
        f"{config.vocab_size} table rows padded to {config.padded_vocab}",
    ]
    return Converted(config, state, "all versions", "nanoPALM has one function", notes)


def _config(tensors: Tensors, given: Hyperparameters, outside: dict[str, Any]) -> ModelConfig:
    """Sizes from the shapes; those of the checkpoint and config.json must agree."""
    depth = 0
    while f"decoder.blocks.{depth}.mqa_ln.weight" in tensors:
        depth += 1
    vocab, dim = tensors.shape("decoder.word_embds.weight", 2)
    rows = tensors.shape("decoder.blocks.0.multi_query_attn.c_attn.weight", 2)[0]
    head_dim, odd = divmod(rows - dim, 2)  # rows: q, k, v
    if odd or head_dim < 2 or head_dim % 2 or dim % head_dim:
        raise CheckpointError(
            f"{tensors.where}: {rows} attention rows are not those of one key/value head "
            f"and {dim} query rows; the file was altered"
        )
    heads = dim // head_dim
    for stated in (given, Hyperparameters(str(tensors.where), _arguments(tensors, outside))):
        stated.agree(n_embed=dim, n_head=heads, vocab_size=vocab, n_layer=depth)
    training = outside.get("config")
    trained = Hyperparameters(str(tensors.where), training if isinstance(training, dict) else {})
    return ModelConfig(
        vocab_size=vocab,
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=head_dim,
        ff_dim=4 * heads * dim,
        rotary="nanopalm",
        context=trained.whole("block_size") or 1024,
    )


def _arguments(tensors: Tensors, outside: dict[str, Any]) -> dict[str, Any]:
    """The sizes in model_args of ckpt.pt, a dict or a pickled PaLMConfig."""
    saved = outside.get("model_args")
    if saved is None:
        return {}
    fields = saved.fields if isinstance(saved, PaLMConfig) else saved
    if not isinstance(fields, dict):
        raise CheckpointError(f"{tensors.where}: model_args hold no settings; the file was altered")
    return {name: fields[name] for name in _SIZES if name in fields}


def _block(tensors: Tensors, block: str, config: ModelConfig) -> dict[str, Tensor]:
    dim, hidden, d = config.dim, config.ff_dim, config.head_dim
    attention = tensors.take(f"{block}multi_query_attn.c_attn.weight", dim + 2 * d, dim)
    attention = attention * tensors.take(f"{block}mqa_ln.weight", dim)
    fc = tensors.take(f"{block}mlp.fc.weight", 2 * hidden, dim)
    value, gate = (fc * tensors.take(f"{block}mlp_ln.weight", dim)).split(hidden)
    return {
        "norm.weight": torch.ones(dim),
        "project_in.q": attention[:dim].clone(),
        "project_in.kv": attention[dim:].clone(),
        "project_in.gate": gate.clone(),
        "project_in.up": value.clone(),
        "project_out.out": tensors.take(f"{block}multi_query_attn.out_proj.weight", dim, dim),
        "project_out.down": tensors.take(f"{block}mlp.proj.weight", dim, hidden),
    }
