"""Saves a model in OpenPaLM's or palm-rlhf-pytorch's format and checks its reloaded logits."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpalm.base.files import atomic_folder
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import fingerprint
from openpalm.convert.detect import read_foreign
from openpalm.convert.eras import NEWEST
from openpalm.convert.palm_rlhf.reward import write_reward
from openpalm.convert.palm_rlhf.write import write_palm_rlhf
from openpalm.errors import CheckpointError, OpenPalmError, StorageError, WorkError
from openpalm.model import lora
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit where that is above one."""


def check_output_directory(directory: Path) -> None:
    """Raises CheckpointError unless the directory is new or empty."""
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise CheckpointError(f"{directory}: exists already; give another directory, or remove it")


def save_as_openpalm(
    model: Transformer,
    directory: Path,
    *,
    lineage: dict[str, Any],
    tokenizer_json: str | None = None,
) -> float:
    """Saves a checkpoint with a fingerprint; returns the largest difference of reloaded logits.

    Raises WorkError and removes the directory if it is above TOLERANCE.
    """
    check_output_directory(directory)
    checkpoint.save(
        directory, model, lineage=lineage, tokenizer_json=tokenizer_json, fingerprint=True
    )
    return _compared(model, directory, lambda: checkpoint.load(directory))


def save_as_palm_rlhf(model: Transformer, directory: Path) -> tuple[float, list[str]]:
    """Saves config.json with palm.pt (adapters merged) or reward.pt, for palm-rlhf-pytorch.

    Returns the largest difference of reloaded logits, and notes. Raises CheckpointError for a
    model that palm-rlhf-pytorch cannot express, StorageError if the disk is full, WorkError, with
    the directory removed, if the difference is above TOLERANCE.
    """
    check_output_directory(directory)
    arguments, state, notes = (
        write_reward(model)
        if isinstance(model, RewardModel)
        else write_palm_rlhf(model.config, lora.merged(model).state_dict())
    )
    try:
        with atomic_folder(directory) as partial:
            torch.save(state, partial / weights_file_name(model))
            text = json.dumps(arguments, indent=2) + "\n"
            (partial / "config.json").write_text(text, encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or "the disk is full or read-only"
        raise StorageError(f"{directory}: cannot be written ({reason})") from error
    return _compared(
        model, directory, lambda: read_foreign(directory, era=NEWEST.last).model()
    ), notes


def weights_file_name(model: Transformer) -> str:
    """The weights file that `save_as_palm_rlhf` writes for this model."""
    return "reward.pt" if isinstance(model, RewardModel) else "palm.pt"


def check_reloaded(
    directory: Path, expected: Callable[[], Tensor], reloaded: Callable[[], Tensor]
) -> float:
    """The largest difference of two outputs; removes the directory if they differ.

    Raises WorkError above TOLERANCE, or if the directory cannot be read again.
    """
    with removed_on_error(directory):
        with torch.no_grad():
            first, second = expected(), reloaded()
        difference = (first - second).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, first.abs().max().item()):  # also true for nan
            raise WorkError(
                f"{directory}: its reloaded logits differ by {difference:.1e}; removed it"
            )
    return difference


@contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Removes the directory that was written if the block fails; what was wrong is WorkError."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OpenPalmError) and not isinstance(error, WorkError):
            raise WorkError(f"{error}; removed it") from error
        raise


def _compared(model: Transformer, directory: Path, reload: Callable[[], Transformer]) -> float:
    ids = fingerprint.fixed_tokens(model.config)
    return check_reloaded(
        directory,
        lambda: fingerprint.output(model, ids),
        lambda: fingerprint.output(reload(), ids),
    )
