"""Detects the project that wrote a foreign checkpoint, and converts it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from openpalm import __version__
from openpalm.base.files import sha256_of
from openpalm.convert.conversion import Converted
from openpalm.convert.files import Tensors, find_file, read_hyperparameters, read_tensors
from openpalm.convert.nanopalm import read_nanopalm
from openpalm.convert.palm_rlhf.read import read_palm_pytorch, read_palm_rlhf
from openpalm.convert.palm_rlhf.reward import is_reward, read_reward
from openpalm.errors import CheckpointError

Project = Literal["palm-rlhf-pytorch", "palm-pytorch", "nanopalm"]

# a tensor name in every checkpoint of the project
_PROJECT_KEYS: dict[Project, tuple[str, ...]] = {
    "palm-rlhf-pytorch": ("layers.0.fn.attn_out.weight",),
    "palm-pytorch": ("1.fn.attn_out.weight",),
    "nanopalm": ("decoder.blocks.0.mqa_ln.weight",),
}
_ACTOR_PROJECT_KEYS = ("actor_palm.", "critic_palm.")


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint(Converted):
    """A converted checkpoint with its file and its project."""

    file: Path
    project: Project

    def lineage(self) -> dict[str, Any]:
        """The lineage of the converted checkpoint, for its manifest."""
        return {
            "kind": "converted",
            "source_file": self.file.name,
            "source_sha256": sha256_of(self.file),
            "source": self.project,
            "era": self.era,
            "era_assumed_because": self.why,
            "openpalm": __version__,
            "torch": str(torch.__version__),
        }


def read_foreign(
    path: Path,
    project: Project | None = None,
    era: str | None = None,
    config_path: Path | None = None,
) -> ForeignCheckpoint:
    """Reads a foreign checkpoint: a file, or a folder with exactly one checkpoint file.

    project: None detects it from the tensor names; era: a version of palm-rlhf-pytorch, None
    guesses; config_path: JSON file of hyperparameters, None reads config.json in the file's folder.
    Nothing in the file is executed. Raises CheckpointError with the file, the fault and the remedy.
    """
    file = find_file(path)
    tensors, outside = read_tensors(file)
    found = _detect(tensors)
    if project is not None and project != found:
        raise CheckpointError(
            f"{file}: --from {project}, but its tensor names are those of {found}"
        )
    given = read_hyperparameters(config_path, file)
    if found == "palm-rlhf-pytorch":
        read = read_reward if is_reward(tensors) else read_palm_rlhf
        converted = read(tensors, given, era)
    elif found == "palm-pytorch":
        converted = read_palm_pytorch(tensors, given, era)
    elif era is not None:
        raise CheckpointError(f"--era {era}: nanoPALM has no versions that differ; leave it out")
    else:
        converted = read_nanopalm(tensors, given, outside)
    return ForeignCheckpoint(**vars(converted), file=file, project=found)


def _detect(tensors: Tensors) -> Project:
    for project, keys in _PROJECT_KEYS.items():
        if all(key in tensors for key in keys):
            return project
    if is_reward(tensors):
        return "palm-rlhf-pytorch"
    if any(name.startswith(_ACTOR_PROJECT_KEYS) for name in tensors.names):
        raise CheckpointError(
            f"{tensors.where}: holds an ActorCritic; convert reads only its PaLM: "
            "save the state_dict() of that one alone"
        )
    shown = ", ".join(sorted(tensors.names)[:3])
    raise CheckpointError(
        f"{tensors.where}: its tensor names ({shown:.120}) are of no known project; convert reads "
        f"{', '.join(_PROJECT_KEYS)}"
    )
