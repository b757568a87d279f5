"""The settings of alignment runs, checked at birth."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from openpalm.base.settings import check, spell
from openpalm.base.typed import home
from openpalm.errors import SettingsError
from openpalm.model.config import MAX_BINS, MAX_MEMBERS
from openpalm.train.config import TrainSettings

GroupAdvantage = Literal["grpo", "dr-grpo", "dapo", "rloo"]
RewardLoss = Literal["bradley-terry", "regression", "binned", "hl-gauss", "ordinal"]
PairLoss = Literal["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"]
WITHOUT_REFERENCE = ("simpo", "orpo")
_LOSSES_OF: dict[str, tuple[PairLoss, ...]] = {
    "label_smoothing": ("cdpo",),
    "length_normalise": ("dpo", "cdpo", "ipo", *WITHOUT_REFERENCE),
    "margin": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
_REWARD_LOSSES_OF: dict[str, tuple[RewardLoss, ...]] = {
    "margin_scale": ("bradley-terry",),
    "centring_coef": ("bradley-terry",),
    "bins": ("binned", "hl-gauss", "ordinal"),
    "axis": ("regression", "binned", "hl-gauss", "ordinal"),
}


def _refuse_options_of_others(
    settings: TrainSettings, loss: str, losses_of: Mapping[str, Sequence[str]]
) -> None:
    """Raises SettingsError for an option that was set but belongs to other losses."""
    for option in fields(settings):
        losses, value = losses_of.get(option.name, (loss,)), getattr(settings, option.name)
        if loss not in losses and value != option.default:
            raise SettingsError(
                f"{spell(option.name)} {value}: is an option of --loss {' or '.join(losses)}, not "
                f"of {loss}; leave it out"
            )


def reward_sources(given: list[str] | str | None) -> list[str]:
    """Each [WEIGHT*]SOURCE of --reward, which takes one or, in brackets, several."""
    if isinstance(given, str):
        inside = re.fullmatch(r"\s*\[(.*)\]\s*", given, re.DOTALL)
        given = inside[1].split(",") if inside else [given]
    words = (word.strip().strip("'\"").strip() for word in given or ())
    place = r"(?:(?<=^)|(?<=[*@])|(?<=^rules:)|(?<=\*rules:))~/"
    return [re.sub(place, lambda _: home("~/"), word) for word in words if word]


@dataclass(frozen=True)
class SftSettings(TrainSettings):
    """Supervised fine-tuning on conversations."""

    pack: bool = False
    """sequence packing: several conversations in a row, without attention between them"""
    template: Literal["chat", "none"] = "chat"
    """chat template: chat marks the turns, none joins prompt and completion as plain text"""


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """Preference optimisation on pairs (--batch-tokens counts both completions), or with KTO."""

    loss: PairLoss = "dpo"
    """loss: dpo, cdpo (for noisy labels), ipo, simpo and orpo (both without a reference model)
    train on pairs; kto on labelled completions"""
    beta: float | None = None
    """scale of the implicit reward: a larger beta stays closer to the reference; default: 0.1,
    for simpo 2.0"""
    label_smoothing: float = 0.1
    """cdpo: assumed share of pairs with a wrong label"""
    length_normalise: bool = False
    """divide log-probabilities by the number of completion tokens; simpo and orpo always do"""
    margin: float = 1.0
    """simpo: target margin between the rewards of chosen and rejected completion"""
    desirable_weight: float = 1.0
    """kto: weight lambda_D of completions labelled desirable"""
    undesirable_weight: float = 1.0
    """kto: weight lambda_U of completions labelled undesirable"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and not 0 < self.beta < 1000:
            raise SettingsError(f"--beta {self.beta}: must be above 0 and below 1000")
        if not 0 <= self.label_smoothing < 0.5:
            raise SettingsError(f"--label-smoothing {self.label_smoothing}: must be in [0, 0.5)")
        if not 0 <= self.margin < 1000:
            raise SettingsError(f"--margin {self.margin}: must be 0 or more, below 1000")
        _refuse_options_of_others(self, self.loss, _LOSSES_OF)
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 < (value := getattr(self, name)) < 1000:
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} {value}: must be above 0 and below 1000")

    @property
    def resolved_beta(self) -> float:
        """--beta, or its default for the loss."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """When a run stops because its held-out answers say that the reward is being gamed."""

    gold_drop: float | None = None
    """the gold reward falls this far below its best while the reward rises"""
    max_kl: float | None = None
    """nats an answer is away from the reference"""
    max_length: float | None = None
    """tokens of the mean answer"""
    min_entropy: float | None = None
    """nats of the policy's mean entropy"""

    def __post_init__(self) -> None:
        for name in ("gold_drop", "max_kl", "max_length", "min_entropy"):
            value = getattr(self, name)
            known = value is None or 0 <= value < math.inf
            check(known, f"early_stopping.{name}", value, "0 or more, and finite")


@dataclass(frozen=True)
class RolloutSettings(TrainSettings):
    """A run that learns from its own answers; a step takes a share of a rollout's answers."""

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """of the arithmetic (weights stay float32); auto takes the faster one here"""
    reward: list[str] | str | None = None
    """[WEIGHT*]SOURCE, several in brackets: a reward model's run, FILE.py:FUNCTION, or exact"""
    gold_reward: str | None = None
    """a SOURCE that is never trained on: what the held-out answers are judged by besides"""
    prompts_per_rollout: int = 8
    """prompts of a rollout"""
    num_completions: int = 4
    """answers to each prompt"""
    max_new_tokens: int = 64
    """tokens of an answer at most"""
    temperature: float = 1.0
    """of the policy: of its answers and of their probabilities alike"""
    epochs_per_rollout: int = 1
    """times a rollout's answers are gone through"""
    minibatches: int = 1
    """optimizer steps of one pass"""
    kl_coef: float = 0.05
    """what a nat of distance to the reference costs"""
    kl: Literal["reward", "k2", "k3"] = "reward"
    """where that is paid: in the reward (exact), or in the loss as k2 or k3"""
    target_kl: float | None = None
    """nats an answer may be away; beta is then steered towards it"""
    kl_horizon: int = 1000
    """answers over which beta follows --target-kl"""
    clip_low: float = 0.2
    """how far below one a token's probability ratio still counts"""
    clip_high: float | None = None
    """how far above one; not set is 0.2, and 0.28 for dapo"""
    entropy_coef: float = 0.0
    """what a nat of the policy's entropy is worth"""
    rollout_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """of the engine that answers; fewer bits are faster and are corrected for"""
    max_importance_weight: float = 2.0
    """largest weight of that correction"""
    rollout_memory_bytes: int = 1 << 28
    """of a rollout in memory; a larger one lies in a file beside the run"""
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    """when the held-out answers stop the run"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "prompts_per_rollout",
            "max_new_tokens",
            "epochs_per_rollout",
            "minibatches",
            "kl_horizon",
        ):
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(self.num_completions >= 1, "num_completions", self.num_completions, "1 or more")
        check(0 < self.temperature <= 100, "temperature", self.temperature, "in (0, 100]")
        check(0 <= self.kl_coef < 1000, "kl_coef", self.kl_coef, "0 or more, below 1000")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            check(value is None or 0 < value < 100, name, value, "above 0")
        check(self.clip_low < 1, "clip_low", self.clip_low, "below 1")
        check(0 <= self.entropy_coef < 100, "entropy_coef", self.entropy_coef, "0 or more")
        check(
            self.max_importance_weight >= 1,
            "max_importance_weight",
            self.max_importance_weight,
            "1 or more",
        )
        check(self.target_kl is None or self.target_kl > 0, "target_kl", self.target_kl, "above 0")
        check(
            self.rollout_memory_bytes >= 0,
            "rollout_memory_bytes",
            self.rollout_memory_bytes,
            "0 or more",
        )
        if self.target_kl is not None and self.kl != "reward":
            raise SettingsError(f"--target-kl: steers --kl reward, not {self.kl}; leave it out")
        if self.target_kl is not None and not self.kl_coef:
            raise SettingsError("--target-kl: steers a --kl-coef above 0; give one")
        if self.rollout_dtype != "float32" and self.temperature != 1:
            raise SettingsError(
                f"--rollout-dtype {self.rollout_dtype}: is corrected for at --temperature 1 "
                f"only, not {self.temperature}; leave one of them out"
            )
        if self.early_stopping.gold_drop is not None and self.gold_reward is None:
            raise SettingsError(
                "--early-stopping.gold-drop: needs --gold-reward, a reward that is not trained on"
            )
        rows = self.prompts_per_rollout * self.num_completions
        if rows % self.minibatches:
            raise SettingsError(
                f"--minibatches {self.minibatches}: must divide prompts x completions ({rows})"
            )

    @property
    def one_step(self) -> bool:
        """Whether every answer is learnt from in the first step after it was given."""
        return self.epochs_per_rollout * self.minibatches == 1

    @property
    def highest_clip(self) -> float:
        return 0.2 if self.clip_high is None else self.clip_high


def rollout_rate(fine_tuning: float) -> float:
    """The learning rate of a run on rollouts, from the one that suits fine-tuning that model.

    It falls faster with the size, as a square through two points: a third of it at a million
    parameters (measured in docs/proofs.md; the whole of it forgets, a tenth is slow), and 3e-6 at
    a billion (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO").
    """
    return fine_tuning**2 / 0.003


@dataclass(frozen=True)
class PpoSettings(RolloutSettings):
    """Proximal policy optimisation, with a critic."""

    prompts_per_rollout: int = 32
    """prompts of a rollout"""
    num_completions: int = 1
    """answers to each prompt"""
    epochs_per_rollout: int = 2
    """times a rollout's answers are gone through"""
    critic: Literal["shared", "detached", "separate"] = "shared"
    """one trunk for both, the policy's trunk read but not changed, or a trunk of its own"""
    value_loss_coef: float = 0.5
    """of the critic's loss beside the policy's"""
    value_bins: int = 0
    """bins of a critic that classifies (HL-Gauss); 0 is one that regresses"""
    value_range: float = 5.0
    """the bins reach from minus this to this"""
    value_clip: float = 0.2
    """how far a value may move from the rollout's before its gain stops counting"""
    discount: float = 1.0
    """of the next token's value"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    whiten_advantages: bool = True
    """give a rollout's advantages mean 0 and deviation 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.value_loss_coef < 100, "value_loss_coef", self.value_loss_coef, "0 or more")
        wanted = "0, or at least 2 and at most 1024"
        bins = self.value_bins
        check(bins == 0 or 2 <= bins <= 1024, "value_bins", bins, wanted)
        check(self.value_range > 0, "value_range", self.value_range, "above 0")
        check(self.value_clip > 0, "value_clip", self.value_clip, "above 0")
        for name in ("discount", "gae_lambda"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")


@dataclass(frozen=True)
class GrpoSettings(RolloutSettings):
    """Group-relative policy optimisation and its kin."""

    advantage: GroupAdvantage = "dr-grpo"
    """how answers to one prompt are measured against each other, and what losses average over"""
    num_completions: int = 8
    """answers to each prompt"""
    max_resamples: int | None = None
    """times that prompts with equal rewards are drawn anew; not set is 0, and 3 for dapo"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.num_completions >= 2,
            "num_completions",
            self.num_completions,
            "2 or more: they are compared",
        )
        check(
            self.max_resamples is None or self.max_resamples >= 0,
            "max_resamples",
            self.max_resamples,
            "0 or more",
        )

    @property
    def highest_clip(self) -> float:
        higher = self.clip_high is None and self.advantage == "dapo"
        return 0.28 if higher else super().highest_clip

    @property
    def resample_limit(self) -> int:
        return (
            self.max_resamples if self.max_resamples is not None else 3 * (self.advantage == "dapo")
        )


@dataclass(frozen=True)
class RewardSettings(TrainSettings):
    """Training of a reward model on pairs or on ratings of single completions."""

    loss: RewardLoss = "bradley-terry"
    """loss: bradley-terry trains on pairs; regression, binned, hl-gauss and ordinal on ratings"""
    ensemble_size: int = 1
    """number of heads on the shared trunk; the reward is their mean"""
    pooling: Literal["last", "mean"] = "last"
    """a head reads the state of the last token, or the mean over all tokens"""
    segment_embeddings: bool = False
    """learned embeddings that mark tokens as prompt or completion, as in palm-rlhf-pytorch"""
    margin_scale: float = 0.0
    """bradley-terry: factor of each pair's margin, which is then the wanted reward difference"""
    centring_coef: float = 0.0
    """bradley-terry: coefficient of (r_w + r_l)^2, which keeps rewards around zero; try 0.01"""
    bins: int | None = None
    """binned, hl-gauss, ordinal: number of values from the lowest to the highest rating; default:
    every whole number, for hl-gauss with fractional ratings 21"""
    axis: str | None = None
    """axis to learn, in preference records with ratings on several axes"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ensemble_size <= MAX_MEMBERS:
            raise SettingsError(f"--ensemble-size {self.ensemble_size}: must be 1 to {MAX_MEMBERS}")
        for name in ("margin_scale", "centring_coef"):
            value = getattr(self, name)
            if not 0 <= value < 1000:
                raise SettingsError(f"{spell(name)} {value}: must be 0 or more, below 1000")
        _refuse_options_of_others(self, self.loss, _REWARD_LOSSES_OF)
        if self.bins is not None and not 2 <= self.bins <= MAX_BINS:
            raise SettingsError(f"--bins {self.bins}: must be 2 to {MAX_BINS}")

    @property
    def reads_pairs(self) -> bool:
        """Whether the data is pairs, not ratings."""
        return self.loss == "bradley-terry"
