"""The settings of alignment runs, checked at birth."""

from dataclasses import dataclass
from typing import Literal

from openpalm.errors import SettingsError
from openpalm.train.config import TrainSettings

PairLoss = Literal["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"]
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    """A fine-tuning run on conversations."""

    pack: bool = False
    """several conversations in a sequence, none seeing another: less padding, larger steps"""
    template: Literal["chat", "none"] = "chat"
    """chat marks the turns; none joins a prompt and its completion as plain text"""


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """A run on pairs of answers, of which --batch-tokens counts both sides, or on verdicts."""

    loss: PairLoss = "dpo"
    """dpo, cdpo (noisy labels), ipo, simpo or orpo (without a reference), or kto (of verdicts)"""
    beta: float | None = None
    """how strongly answers are pulled apart; not set is 0.1, and 2.0 for simpo"""
    label_smoothing: float = 0.1
    """of cdpo: the share of pairs that are the wrong way round"""
    length_normalise: bool = False
    """divide each answer's log-probability by its tokens; simpo and orpo always do"""
    margin: float = 1.0
    """of simpo: how much more likely, times beta, the chosen answer shall be"""
    desirable_weight: float = 1.0
    """of kto: how much a good verdict counts"""
    undesirable_weight: float = 1.0
    """of kto: how much a bad verdict counts"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and not 0 < self.beta < 1000:
            raise SettingsError(f"--beta {self.beta}: must be above 0 and below 1000")
        if not 0 <= self.label_smoothing < 0.5:
            raise SettingsError(f"--label-smoothing {self.label_smoothing}: must be in [0, 0.5)")
        if not 0 <= self.margin < 1000:
            raise SettingsError(f"--margin {self.margin}: must be 0 or more, below 1000")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < (value := getattr(self, name)) < 1000:
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} {value}: must be above 0 and below 1000")

    @property
    def strength(self) -> float:
        """Beta, or its default for the loss."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1
