"""The settings of alignment runs, checked at birth."""

from dataclasses import dataclass
from typing import Literal

from openpalm.errors import SettingsError
from openpalm.model.config import MAX_BINS, MAX_MEMBERS
from openpalm.settings import spell
from openpalm.train.config import TrainSettings

RewardLoss = Literal["bradley-terry", "regression", "binned", "hl-gauss", "ordinal"]
PairLoss = Literal["dpo", "cdpo", "ipo", "simpo", "orpo"]
WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """A run on pairs of answers; --batch-tokens counts both sides."""

    loss: PairLoss = "dpo"
    """dpo, cdpo (noisy labels), ipo, simpo or orpo (these two need no reference)"""
    beta: float | None = None
    """how strongly answers are pulled apart; not set is 0.1, and 2.0 for simpo"""
    label_smoothing: float = 0.1
    """of cdpo: the share of pairs that are the wrong way round"""
    length_normalise: bool = False
    """divide each answer's log-probability by its tokens; simpo and orpo always do"""
    margin: float = 1.0
    """of simpo: how much more likely, times beta, the chosen answer shall be"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and not 0 < self.beta < 1000:
            raise SettingsError(f"--beta {self.beta}: must be above 0 and below 1000")
        if not 0 <= self.label_smoothing < 0.5:
            raise SettingsError(f"--label-smoothing {self.label_smoothing}: must be in [0, 0.5)")
        if not 0 <= self.margin < 1000:
            raise SettingsError(f"--margin {self.margin}: must be 0 or more, below 1000")

    @property
    def strength(self) -> float:
        """Beta, or its default for the loss."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1


@dataclass(frozen=True)
class RewardSettings(TrainSettings):
    """A reward model's run on pairs of answers or on ratings of single ones."""

    loss: RewardLoss = "bradley-terry"
    """bradley-terry learns from pairs; regression, binned, hl-gauss and ordinal from ratings"""
    members: int = 1
    """heads over the one trunk; the reward is their mean, their spread a doubt"""
    read: Literal["last", "mean"] = "last"
    """what a head reads: the last real token's state, or the mean over the real ones"""
    marks: bool = False
    """learned vectors tell prompt from answer, as in palm-rlhf-pytorch"""
    margin_scale: float = 0.0
    """of bradley-terry: how much of each pair's own margin the rewards shall differ by"""
    centring: float = 0.0
    """of bradley-terry: weight of (r_w + r_l)^2, which keeps rewards around zero; try 0.01"""
    bins: int | None = None
    """of binned, hl-gauss and ordinal: values from the lowest rating to the highest; not set
    takes each whole number, and of hl-gauss 21 where ratings are not whole"""
    axis: str | None = None
    """which ratings to learn, where preference records rate several axes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.members <= MAX_MEMBERS:
            raise SettingsError(f"--members {self.members}: must be 1 to {MAX_MEMBERS}")
        for name in ("margin_scale", "centring"):
            value = getattr(self, name)
            if not 0 <= value < 1000:
                raise SettingsError(f"{spell(name)} {value}: must be 0 or more, below 1000")
        if self.bins is not None and not 2 <= self.bins <= MAX_BINS:
            raise SettingsError(f"--bins {self.bins}: must be 2 to {MAX_BINS}")

    @property
    def reads_pairs(self) -> bool:
        """Whether the data is pairs, not ratings."""
        return self.loss == "bradley-terry"
