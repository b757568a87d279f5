"""The one door for foreign checkpoints: which project wrote it, and what it is in our terms."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from openpalm import __version__
from openpalm.base.hashing import sha256_of
from openpalm.convert.conversion import Converted
from openpalm.convert.files import Tensors, find_file, read_hyperparameters, read_tensors
from openpalm.convert.nanopalm import read_nanopalm
from openpalm.convert.palm_rlhf.read import read_palm_pytorch, read_palm_rlhf
from openpalm.convert.palm_rlhf.reward import is_reward, read_reward
from openpalm.errors import CheckpointError

Source = Literal["palm-rlhf-pytorch", "palm-pytorch", "nanopalm"]

# a key that every checkpoint of the project has
_SIGNS: dict[Source, tuple[str, ...]] = {
    "palm-rlhf-pytorch": ("layers.0.fn.attn_out.weight",),
    "palm-pytorch": ("1.fn.attn_out.weight",),
    "nanopalm": ("decoder.blocks.0.mqa_ln.weight",),
}
_ACTOR_SIGNS = ("actor_palm.", "critic_palm.")


@dataclass(frozen=True, kw_only=True)
class Foreign(Converted):
    """A foreign checkpoint that was read: where from, and as what."""

    file: Path
    source: Source

    def lineage(self) -> dict[str, Any]:
        """What the manifest of the converted checkpoint says of its origin."""
        return {
            "kind": "converted",
            "source_file": self.file.name,
            "source_sha256": sha256_of(self.file),
            "source": self.source,
            "era": self.era,
            "era_assumed_because": self.why,
            "openpalm": __version__,
            "torch": str(torch.__version__),
        }


def read_foreign(
    path: Path,
    source: Source | None = None,
    era: str | None = None,
    config_path: Path | None = None,
) -> Foreign:
    """Reads a foreign checkpoint, a file or a folder holding exactly one.

    source: None looks at the keys; era: a version of palm-rlhf-pytorch, None guesses;
    config_path: a JSON of hyperparameters, None looks beside the file. Runs nothing in the file.
    Raises CheckpointError with the file, what is wrong, and the remedy.
    """
    file = find_file(path)
    tensors, around = read_tensors(file)
    found = _detect(tensors)
    if source is not None and source != found:
        raise CheckpointError(f"{file}: --from {source}, but its keys are those of {found}")
    given = read_hyperparameters(config_path, file)
    if found == "palm-rlhf-pytorch":
        read = read_reward if is_reward(tensors) else read_palm_rlhf
        converted = read(tensors, given, era)
    elif found == "palm-pytorch":
        converted = read_palm_pytorch(tensors, given, era)
    elif era is not None:
        raise CheckpointError(f"--era {era}: nanoPALM has no eras; leave it out")
    else:
        converted = read_nanopalm(tensors, given, around)
    return Foreign(**vars(converted), file=file, source=found)


def _detect(tensors: Tensors) -> Source:
    for source, signs in _SIGNS.items():
        if all(sign in tensors for sign in signs):
            return source
    if is_reward(tensors):
        return "palm-rlhf-pytorch"
    if any(name.startswith(_ACTOR_SIGNS) for name in tensors.names):
        raise CheckpointError(
            f"{tensors.where}: holds an ActorCritic; only the PaLM in it can be "
            "converted: save that one's state_dict() alone"
        )
    shown = ", ".join(sorted(tensors.names)[:3])
    raise CheckpointError(
        f"{tensors.where}: its keys ({shown:.120}) are of no project known here; convert reads "
        f"{', '.join(_SIGNS)}"
    )
