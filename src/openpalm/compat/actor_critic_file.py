"""RLHFTrainer's checkpoint.pt: the state dict of palm-rlhf-pytorch's ActorCritic, both ways.

    actor_palm.*   the policy, with its finetune scopes
    critic.*       the critic's trunk, with its own
    value_head.*   weight [bins, dim] and bias [bins]

The optimizers are not in it, as in the original.
"""

from pathlib import Path

import torch
from torch import nn

from openpalm.base.files import atomic_file
from openpalm.checkpoint.tensors import check_finite, refusal
from openpalm.compat.palm import PaLM
from openpalm.convert.files import find_file, read_tensors
from openpalm.errors import CheckpointError, StorageError, one_line


class OriginalActorCritic(nn.Module):
    """The parts under the original's names; it shares their parameters and computes nothing."""

    def __init__(self, actor: PaLM, critic: PaLM, value_head: nn.Linear):
        super().__init__()
        self.actor_palm, self.critic, self.value_head = actor, critic, value_head

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises StorageError when the disk refuses."""
        state = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        try:
            with atomic_file(path) as file:
                torch.save(state, file)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            reason = refusal(error) or str(error).partition("\n")[0]
            raise StorageError(f"{path}: cannot be saved ({reason})") from error

    def load(self, path: Path) -> None:
        """Loads such a file; names and shapes must be exactly those of this module.

        Nothing in the file is executed, and nothing changes before all of it is checked. Raises
        CheckpointError for a file that cannot be read or is of another trainer.
        """
        state = read_tensors(find_file(path))[0].left()
        wanted = {name: list(tensor.shape) for name, tensor in self.state_dict().items()}
        given = {name: list(tensor.shape) for name, tensor in state.items()}
        for name in sorted(wanted.keys() | given.keys()):
            has, needs = given.get(name, "missing"), wanted.get(name, "not used")
            if has != needs:
                raise CheckpointError(
                    f"{path}: is of another trainer ({name} is {has}, here {needs}); make the "
                    "trainer with the same models and LoRA arguments"
                )
        check_finite(path, state)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {one_line(error)}") from None
