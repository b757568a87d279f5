"""Restores a run from its newest checkpoint, and refuses a state that the run cannot have saved."""

import math
from pathlib import Path

import torch

from openpalm.checkpoint import directory as checkpoint
from openpalm.errors import CheckpointError
from openpalm.train.run_directory import step_of
from openpalm.train.trainer import Trainer

_NOT_ITS_STATE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Raised by restoring if a field or tensor is missing, or has another type or shape."""


def restore(trainer: Trainer, newest: Path) -> float:
    """Loads weights and state into the trainer; returns the seconds that the run has taken.

    All processes call it. Raises CheckpointError if train/ holds no state of this run.
    """
    checkpoint.load_weights(trainer.model, newest)
    several = trainer.world.size > 1
    if several:  # once, because hashing reads every file
        trainer.world.on_main(lambda: checkpoint.check_train_state(newest))
    state = checkpoint.load_train_state(newest, checked=several)
    try:
        trainer.restore(state.tensors, state.values)
        elapsed_s = float(state.values["elapsed_s"])
        if not 0 <= elapsed_s < math.inf or trainer.step != step_of(newest):
            raise ValueError(f"step {trainer.step} after {elapsed_s} s")
    except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the file
        raise
    except _NOT_ITS_STATE as error:
        raise CheckpointError(
            f"{newest / 'train'}: its state is not one that this run saves "
            f"({_fault_in_state(error)}); remove this checkpoint to continue from an older one"
        ) from error
    return elapsed_s


def _fault_in_state(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, (RuntimeError, ValueError)):
        return str(error).partition("\n")[0][:200]
    return "a value has another type"
