"""The parity data as cases: which file, by which version, and what else it could be taken for."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openpalm.convert.detect import ForeignCheckpoint, read_foreign
from openpalm.convert.eras import ERAS, Era, era_of

DATA = Path(__file__).parents[1] / "parity" / "data"


@dataclass(frozen=True)
class Case:
    """One foreign checkpoint and the version that computes its logits."""

    file: str
    version: str | None = None

    @property
    def path(self) -> Path:
        return DATA / self.file

    @property
    def qk_norm(self) -> bool:
        return "qk_rmsnorm" in self.file

    def array(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.path.parent / f"{name}.npy"))

    def has(self, name: str) -> bool:
        return (self.path.parent / f"{name}.npy").is_file()

    def read(self, version: str | None = None) -> ForeignCheckpoint:
        return read_foreign(self.path, era=version or self.version)

    def difference(self, foreign: ForeignCheckpoint) -> float:
        """The largest difference of logits from the original's."""
        got = foreign.model().logits(self.array("tokens"))
        return (got - self.array("logits")).abs().max().item()

    def wrong_eras(self) -> list[str]:
        """A version of every era that computes another function from this file."""
        if self.version is None:
            return []
        right = self._function(era_of(self.version))
        return [era.last for era in ERAS if self._function(era) != right]

    def _function(self, era: Era) -> tuple[object, ...]:
        scale = era.qk_scale if self.qk_norm else None
        return era.gamma_minus_one, era.final_norm, era.xpos, scale


RLHF_CASES = [
    Case("palm-rlhf-pytorch/v0.0.68/palm_qk_rmsnorm/palm.pt", "0.0.68"),
    Case("palm-rlhf-pytorch/v0.2.0/palm/palm.pt", "0.2.0"),
    Case("palm-rlhf-pytorch/v0.2.0/palm_qk_rmsnorm/palm.pt", "0.2.0"),
    Case("palm-rlhf-pytorch/v0.2.1/palm/palm.pt", "0.2.1"),
    Case("palm-rlhf-pytorch/v0.2.1/palm_qk_rmsnorm/palm.pt", "0.2.1"),
    Case("palm-rlhf-pytorch/v0.8.0/palm/palm.pt", "0.8.0"),
    Case("palm-rlhf-pytorch/v0.8.0/palm_qk_rmsnorm/palm.pt", "0.8.0"),
]
CASES = [
    *RLHF_CASES,
    Case("PaLM-pytorch/palm/palm.pt"),
    Case("nanoPALM/palm/ckpt.pt"),
    Case("nanoPALM/palm/model_state_dict.pt"),
]
