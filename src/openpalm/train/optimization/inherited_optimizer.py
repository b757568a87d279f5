"""--keep-optimizer: the moments and step counts of the checkpoint that --init names.

Adam's second moment needs about 1 / (1 - beta2) steps before it is a good estimate. A run that
continues on similar data keeps it instead of warming up again, as mesh-transformer-jax does.
"""

import sys
from pathlib import Path

from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint import tensors
from openpalm.checkpoint.manifest import WEIGHTS
from openpalm.errors import SettingsError, count_of
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.optimizer_settings import OptimSettings

_NEW = "leave --keep-optimizer out to start a new optimizer"


def check_optimizer(directory: Path, settings: OptimSettings) -> None:
    """Raises SettingsError unless the checkpoint has the state of the same optimizer."""
    name = checkpoint.optimizer_name(directory)
    if name is None:
        raise SettingsError(f"--keep-optimizer: {directory} holds no optimizer state; {_NEW}")
    if name != settings.kind:
        raise SettingsError(
            f"--keep-optimizer: {directory} was trained with {name}, not {settings.kind}; give "
            f"--optim.name {name}, or {_NEW}"
        )


def inherit_optimizer(optimizer: Optimizer, directory: Path, label: str) -> None:
    """Gives the optimizer the moments and step counts of every weight of the checkpoint.

    Parameters that the checkpoint has no weights for, such as a new critic, start new; a line says
    so. Raises SettingsError if the state lacks a weight or has it in another shape.
    """
    state = checkpoint.load_train_state(directory)
    prefix = "optimizer/"
    moments = {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
    with tensors.opened(directory / WEIGHTS) as file:
        names = file.shapes().keys()
    try:
        new = optimizer.take_over(moments, names)
    except ValueError as error:
        raise SettingsError(
            f"--keep-optimizer: {directory} has no optimizer state that fits this model ({error}); "
            f"{_NEW}"
        ) from None
    if new:
        print(
            f"{label}: the optimizer starts new for {count_of(len(new), 'parameter')} that "
            f"--init has no weights for, such as {new[0]}",
            file=sys.stderr,
        )
