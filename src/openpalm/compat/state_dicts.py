"""What the original's modules have in common here: their state dicts, and their eras.

A module of ours inside keeps its own names; to the outside, alone or as a part of another module,
`state_dict` and `load_state_dict` speak the original's keys.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpalm.convert.eras import NEWEST, Era, era_of
from openpalm.convert.files import Tensors, find_file, read_tensors
from openpalm.errors import CheckpointError

LATEST = NEWEST.last


class OriginalModule(nn.Module):
    """A module of the versions that `era`, one of them, belongs to."""

    def __init__(self, era: str):
        super().__init__()
        self.era: Era = era_of(era)
        self.register_state_dict_post_hook(_write)
        self.register_load_state_dict_pre_hook(_read)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def load(self, path: str | Path) -> None:
        """Takes the weights of a state dict in a file, which must have every key and no other.

        Nothing in it is executed. Raises CheckpointError for a file that cannot be read so, or
        that is of another model.
        """
        tensors, _ = read_tensors(find_file(Path(path)))
        try:
            self.load_state_dict(tensors.left())
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None

    def original_state(self) -> dict[str, Tensor]:
        """The original's state dict, float32 on the CPU."""
        raise NotImplementedError

    def converted_state(self, tensors: Tensors) -> tuple[Mapping[str, Tensor], list[str]]:
        """Ours from the original's, by the names of `named_parameters`; and notes."""
        raise NotImplementedError


def draw_seed() -> int:
    """From torch's own generator, so that torch.manual_seed decides."""
    return int(torch.randint(1 << 62, ()))


def _write(module: OriginalModule, state: dict[str, Any], prefix: str, _: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    like = next(module.parameters()).detach()
    theirs = module.original_state()
    moved = {id(tensor): tensor.to(like) for tensor in theirs.values()}  # tied ones stay tied
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
    """Puts ours in the place of the original's; what is wrong goes where torch collects it."""
    given = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
    whole = module.original_state()
    missing += [prefix + name for name in whole if name not in given]
    unexpected += [prefix + name for name in given if name not in whole]
    for name in whole.keys() & given.keys():
        if whole[name].shape == given[name].shape:
            whole[name] = given[name].detach().cpu()
        else:
            shapes = f"{list(given[name].shape)}, not {list(whole[name].shape)} as here"
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
                said = note.removeprefix("warning: ")
                warnings.warn(f"{said} (to read another era: era=...)", stacklevel=6)
    state.update({prefix + name: tensor for name, tensor in ours.items()})
