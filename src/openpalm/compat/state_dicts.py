"""Base class of the compat modules: state dicts with palm-rlhf-pytorch's names, and eras.

Inside, parameters have our names; `state_dict` and `load_state_dict` convert to and from the
original's, also for a module within another module.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpalm.convert.eras import NEWEST, Era, era_of
from openpalm.convert.files import Tensors, find_file, read_tensors
from openpalm.errors import CheckpointError, one_line

LATEST = NEWEST.last


class OriginalModule(nn.Module):
    """A module that computes the function of palm-rlhf-pytorch `era` (a version)."""

    def __init__(self, era: str):
        super().__init__()
        self.era: Era = era_of(era)
        self.register_state_dict_post_hook(_write)
        self.register_load_state_dict_pre_hook(_read)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def load(self, path: str | Path) -> None:
        """Loads the state dict in a file; its names must be exactly those of this module.

        Nothing in the file is executed. Raises CheckpointError for a file that cannot be read
        or is of another model.
        """
        tensors, _ = read_tensors(find_file(Path(path)))
        try:
            self.load_state_dict(tensors.left())
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {one_line(error)}") from None

    def original_state(self) -> dict[str, Tensor]:
        """The original's state dict, float32 on the CPU."""
        raise NotImplementedError

    def converted_state(self, tensors: Tensors) -> tuple[Mapping[str, Tensor], list[str]]:
        """Our state dict, by the names of `named_parameters`, from the original's; and notes."""
        raise NotImplementedError


def draw_seed() -> int:
    """A seed from torch's generator, so that torch.manual_seed makes it repeatable."""
    return int(torch.randint(1 << 62, ()))


def _write(module: OriginalModule, state: dict[str, Any], prefix: str, _: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    like = next(module.parameters()).detach()
    theirs = module.original_state()
    moved = {id(tensor): tensor.to(like) for tensor in theirs.values()}  # keeps tied tensors tied
    state.update({prefix + name: moved[id(tensor)] for name, tensor in theirs.items()})


def _read(
    module: OriginalModule,
    state: dict[str, Any],
    prefix: str,
    _metadata: object,
    _strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Replaces the original's tensors by ours; adds errors to the lists of torch."""
    given = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
    whole = module.original_state()
    missing += [prefix + name for name in whole if name not in given]
    unexpected += [prefix + name for name in given if name not in whole]
    for name in whole.keys() & given.keys():
        if whole[name].shape == given[name].shape:
            whole[name] = given[name].detach().cpu()
        else:
            shapes = f"{list(given[name].shape)}, not {list(whole[name].shape)}"
            errors.append(f"{prefix}{name} is {shapes}")
    ours: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    try:
        read, notes = module.converted_state(Tensors(Path("the state dict"), whole))
    except CheckpointError as error:
        errors.append(str(error))
    else:
        ours |= read
        for note in notes:
            if note.startswith("warning: "):
                warning = note.removeprefix("warning: ")
                warnings.warn(f"{warning} (to read another era: era=...)", stacklevel=6)
    state.update({prefix + name: tensor for name, tensor in ours.items()})
