"""Writes a checkpoint in any format that `openpalm convert` writes, and compares its logits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from openpalm.base.files import atomic_folder
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import fingerprint
from openpalm.convert.export import (
    check_output_directory,
    check_reloaded,
    save_as_openpalm,
    save_as_palm_rlhf,
    weights_file_name,
)
from openpalm.convert.gptj import huggingface, mesh_write
from openpalm.convert.gptj.names import is_gptj, without_embedding_bias
from openpalm.convert.huggingface.export import gptj_logits, save_as_huggingface, write_around
from openpalm.convert.source import Source, open_source
from openpalm.errors import CheckpointError, StorageError
from openpalm.model.config import ModelConfig

TargetFormat = Literal["openpalm", "mesh-transformer-jax", "huggingface", "palm-rlhf-pytorch"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHARDS = 8
"""cores_per_replica of the released GPT-J"""


@dataclass(frozen=True)
class Written:
    what: str
    """the files, for one line"""
    difference: float
    """largest difference between the reloaded outputs and those of the source"""
    notes: list[str]


def write(
    source: Source,
    directory: Path,
    target: TargetFormat,
    *,
    dtype: str | None = None,
    shards: int | None = None,
) -> Written:
    """Writes `directory`, reloads it and compares; a failed comparison removes it.

    dtype: the type of the weights, None keeps the source's; shards: for mesh-transformer-jax.
    Raises CheckpointError for a model that the format cannot express, StorageError if the disk is
    full, WorkError if the reloaded outputs differ.
    """
    check_output_directory(directory)
    notes: list[str] = []
    if target == "huggingface" and source.config.embedding_bias and _is_native(source):
        config, weights = without_embedding_bias(source.config, source.weights)
        source = replace(source, config=config, weights=weights)
        notes.append("the embedding bias is added to every row of the table")
    if dtype is not None:
        rounded, loaded = source.weights.rounded(DTYPES[dtype]), source.loaded
        loaded = loaded if loaded is None else copy.deepcopy(loaded).to(DTYPES[dtype])
        source = replace(source, weights=rounded, loaded=loaded)
    if target == "palm-rlhf-pytorch":
        model = source.model()
        difference, more = save_as_palm_rlhf(model, directory)
        what = f"{weights_file_name(model)} and config.json for palm-rlhf-pytorch"
        return Written(what, difference, more)
    if target == "mesh-transformer-jax":
        return _write_mesh(source, directory, shards or DEFAULT_SHARDS)
    if target == "huggingface":
        return _write_huggingface(source, directory, notes)
    return _write_openpalm(source, directory)


def _write_openpalm(source: Source, directory: Path) -> Written:
    text = source.tokenizer_json
    what = f"a checkpoint {'without a' if text is None else 'with its'} tokenizer"
    if source.loaded is not None:
        difference = save_as_openpalm(
            source.loaded, directory, lineage=source.lineage, tokenizer_json=text
        )
        return Written(what, difference, [])
    logits = checkpoint.save_one_by_one(
        directory,
        source.config,
        source.weights,
        optimizer=source.optimizer,
        tokenizer_json=text,
        lineage=source.lineage,
    )
    notes = [] if source.optimizer is None else ["optimizer state kept, for --keep-optimizer"]
    return Written(what, _compared(logits, source.config, directory), notes)


def _write_mesh(source: Source, directory: Path, shards: int) -> Written:
    if source.reward is not None:
        raise CheckpointError("a reward model: mesh-transformer-jax has none")
    mesh_write.check_writable(source.config, shards)
    with _written(directory) as partial:
        mesh_write.write_mesh(
            partial,
            source.config,
            source.weights,
            source.optimizer,
            shards=shards,
            step=source.step,
        )
    kind = "slim, without optimizer state" if source.optimizer is None else "full"
    what = f"mesh-transformer-jax, {kind}, step {source.step}, shards: {shards}"
    logits = source.logits(fingerprint.fixed_tokens(source.config))
    return Written(what, _compared(logits, source.config, directory), [])


def _is_native(source: Source) -> bool:
    """Whether transformers has a class of its own for the model: GPTJForCausalLM."""
    config = source.config
    if config.embedding_bias and config.tied:  # the sum with the bias would change the head
        return False
    return source.reward is None and is_gptj(config)


def _write_huggingface(source: Source, directory: Path, notes: list[str]) -> Written:
    if not _is_native(source):
        exported = save_as_huggingface(
            source.config,
            source.weights,
            directory,
            reward=source.reward,
            tokenizer_json=source.tokenizer_json,
            defaults=source.defaults,
            lineage=source.history or source.lineage,
        )
        kind = "CausalLM" if source.reward is None else "SequenceClassification"
        what = f"a folder for AutoModelFor{kind}, with trust_remote_code=True"
        return Written(what, exported.difference, notes + exported.notes)
    huggingface.check_writable(source.config)
    with _written(directory) as partial:
        ids = fingerprint.fixed_tokens(source.config)
        logits = huggingface.write_gptj(partial, source.config, source.weights, ids)
        notes += write_around(
            *(partial, source.config, None),
            dtype=str(source.weights.entries["embedding"].dtype)[6:],
            tokenizer_json=source.tokenizer_json,
            defaults=source.defaults,
            lineage=source.history or source.lineage,
            native=True,
        )
    difference = _compared(logits, source.config, directory)
    theirs = gptj_logits(directory, source.config, ids)
    if theirs is not None:
        found, version = theirs
        check_reloaded(directory, lambda: logits, lambda: found)
        notes.append(f"transformers {version} computes the same logits")
    return Written("a folder for GPTJForCausalLM", difference, notes)


@contextmanager
def _written(directory: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete. Raises StorageError for a full disk."""
    try:
        with atomic_folder(directory) as partial:
            yield partial
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written ({error.strerror})") from error


def _compared(logits: Tensor, config: ModelConfig, directory: Path) -> float:
    """Largest difference between these logits and those of the files that were written."""
    ids = fingerprint.fixed_tokens(config)
    return check_reloaded(directory, lambda: logits, lambda: open_source(directory).logits(ids))
