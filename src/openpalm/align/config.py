"""Settings of alignment: SFT, DPO, reward models, PPO and GRPO; validated when they are created."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from openpalm.base.settings import check, check_field, spell
from openpalm.base.typed import home
from openpalm.errors import SettingsError
from openpalm.train.config import TaskProbeSettings, TrainSettings

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
"""Losses that read an option; an option that is not listed is read by all."""
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
    """Splits the value of --reward into its sources: [WEIGHT*]SOURCE, or several in brackets."""
    if isinstance(given, str):
        inside = re.fullmatch(r"\s*\[(.*)\]\s*", given, re.DOTALL)
        given = inside[1].split(",") if inside else [given]
    words = (word.strip().strip("'\"").strip() for word in given or ())
    # The shell expands ~ at the start of a word only; here it can follow WEIGHT*, rules: or @.
    place = r"(?:(?<=^)|(?<=[*@])|(?<=^rules:)|(?<=\*rules:))~/"
    return [re.sub(place, lambda _: home("~/"), word) for word in words if word]


@dataclass(frozen=True)
class SftSettings(TaskProbeSettings, TrainSettings):
    """Supervised fine-tuning on conversations."""

    data: Path
    """conversations: a .jsonl of messages, of prompt and completion, of question and answer,
    ShareGPT or Alpaca rows; or a .yaml that mixes several"""
    pack: bool = False
    """sequence packing: several conversations in a row, without attention between them"""
    template: Literal["chat", "none"] = "chat"
    """chat template: chat marks the turns, none joins prompt and completion as plain text"""

    def __post_init__(self) -> None:
        self.check_tasks()
        super().__post_init__()


@dataclass(frozen=True)
class DpoSettings(TrainSettings):
    """Preference optimisation on pairs (--batch-tokens counts both completions), or with KTO."""

    data: Path
    """pairs: a .jsonl of prompt, chosen and rejected, of ranked or scored responses, or of
    preference records; for kto also of prompt, completion and label"""
    loss: PairLoss = "dpo"
    """dpo, cdpo (for noisy labels), ipo, simpo and orpo (both without a reference model)
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
        check_field(self, "beta", lambda v: 0 < v < 1000, "above 0 and below 1000")
        check_field(self, "label_smoothing", lambda v: 0 <= v < 0.5, "in [0, 0.5)")
        check_field(self, "margin", lambda v: 0 <= v < 1000, "0 or more, below 1000")
        _refuse_options_of_others(self, self.loss, _LOSSES_OF)
        for name in ("desirable_weight", "undesirable_weight"):
            check_field(self, name, lambda v: 0 < v < 1000, "above 0 and below 1000")

    @property
    def resolved_beta(self) -> float:
        """--beta, or its default for the loss."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """Limits for evaluations on held-out prompts; a run that passes one stops with status 1."""

    gold_drop: float | None = None
    """largest fall of the gold reward below its best while the reward rises"""
    max_kl: float | None = None
    """largest mean KL from the reference, nats per completion"""
    max_length: float | None = None
    """largest mean length, tokens per completion"""
    min_entropy: float | None = None
    """smallest mean entropy of the policy, nats per token"""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            known = value is None or 0 <= value < math.inf
            check(known, f"early_stopping.{option.name}", value, "0 or more, and finite")


@dataclass(frozen=True)
class RolloutSettings(TrainSettings):
    """RL on sampled completions; each step learns from an equal share of a rollout."""

    data: Path
    """prompts: a .jsonl with a prompt, question or messages in each row, and any fields that the
    reward reads; the rows of sft and dpo do too, without their completions"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """number format of the arithmetic; weights stay float32; auto: the faster one here"""
    reward: list[str] | str | None = None
    """reward, as SOURCE or '[WEIGHT*SOURCE, ...]'; a SOURCE is a reward model's run,
    FILE.py:FUNCTION, hub:NAME, rules:FILE@CHECKPOINT or exact"""
    gold_reward: str | None = None
    """SOURCE of a second reward, evaluated on held-out prompts but never trained on"""
    prompts_per_rollout: int = 8
    """prompts per rollout"""
    num_completions: int = 4
    """completions per prompt"""
    max_new_tokens: int = 64
    """maximum tokens per completion"""
    temperature: float = 1.0
    """sampling temperature; the policy's log-probabilities are taken at it too"""
    epochs_per_rollout: int = 1
    """epochs over each rollout"""
    minibatches: int = 1
    """optimizer steps per epoch"""
    kl_coef: float = 0.05
    """KL penalty coefficient, per nat"""
    kl: Literal["reward", "k2", "k3"] = "reward"
    """KL penalty: in the reward, as -log r (estimator k1, exact gradient), or in the loss, as
    (log r)^2 / 2 of a completion (k2) or r - 1 - log r of each token (k3); r: probability under
    the reference, divided by that under the policy"""
    target_kl: float | None = None
    """target KL, nats per completion; --kl-coef then adapts to reach it"""
    kl_horizon: int = 1000
    """completions over which --kl-coef adapts; fewer is faster"""
    clip_low: float = 0.2
    """clipping range of the probability ratio below 1"""
    clip_high: float | None = None
    """clipping range of the probability ratio above 1; default 0.2"""
    entropy_coef: float = 0.0
    """entropy bonus coefficient, per nat"""
    rollout_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """number format of the weights while sampling; importance weights correct for a smaller one"""
    max_importance_weight: float = 2.0
    """truncation of importance weights: their upper limit"""
    rollout_memory_bytes: int = 1 << 28
    """largest rollout kept in memory, bytes; a larger one is in a temporary file in --out"""
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    """early stopping, by evaluations on held-out prompts"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("prompts_per_rollout", "num_completions", "max_new_tokens"),
            *("epochs_per_rollout", "minibatches", "kl_horizon", "max_importance_weight"),
        ):
            check_field(self, name, lambda v: v >= 1, "1 or more")
        check_field(self, "temperature", lambda v: 0 < v <= 100, "in (0, 100]")
        check_field(self, "kl_coef", lambda v: 0 <= v < 1000, "0 or more, below 1000")
        check_field(self, "clip_low", lambda v: 0 < v < 1, "above 0, below 1")
        check_field(self, "clip_high", lambda v: 0 < v < 100, "above 0, below 100")
        check_field(self, "entropy_coef", lambda v: 0 <= v < 100, "0 or more, below 100")
        check_field(self, "target_kl", lambda v: v > 0, "above 0")
        check_field(self, "rollout_memory_bytes", lambda v: v >= 0, "0 or more")
        if self.target_kl is not None and self.kl != "reward":
            raise SettingsError(f"--target-kl: adapts --kl reward, not {self.kl}; leave it out")
        if self.target_kl is not None and not self.kl_coef:
            raise SettingsError("--target-kl: adapts a --kl-coef above 0; give one")
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
    def takes_float16(self) -> bool:
        return False

    @property
    def one_step(self) -> bool:
        """Whether a rollout is used for one step only, so that the policy is never older."""
        return self.epochs_per_rollout * self.minibatches == 1

    @property
    def highest_clip(self) -> float:
        """--clip-high, or its default."""
        return 0.2 if self.clip_high is None else self.clip_high


def rollout_rate(fine_tuning: float) -> float:
    """The learning rate of RL, from the one that suits fine-tuning the same model.

    It falls faster with the model's size: a square through two points. One is a third of the
    fine-tuning rate at a million parameters (measured in docs/proofs.md; the full rate forgets, a
    tenth is slow), the other 3e-6 at a billion (Huang et al. 2024, "The N+ Implementation Details
    of RLHF with PPO").
    """
    return fine_tuning**2 / 0.003


@dataclass(frozen=True)
class PpoSettings(RolloutSettings):
    """Proximal policy optimisation (PPO), with a critic."""

    prompts_per_rollout: int = 32
    """prompts per rollout"""
    num_completions: int = 1
    """completions per prompt"""
    epochs_per_rollout: int = 2
    """epochs over each rollout"""
    critic: Literal["shared", "detached", "separate"] = "shared"
    """critic's trunk: the policy's, the policy's without gradients into it, or its own"""
    value_loss_coef: float = 0.5
    """value loss coefficient"""
    value_bins: int = 0
    """bins of a critic that classifies returns, with a Gaussian around the return as target
    (HL-Gauss); 0: the critic predicts the number"""
    value_range: float = 5.0
    """range of the bins, from minus this to this"""
    value_clip: float = 0.2
    """value clipping range"""
    discount: float = 1.0
    """discount factor per token (gamma)"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (GAE)"""
    whiten_advantages: bool = True
    """normalise each rollout's advantages to mean 0 and standard deviation 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "value_loss_coef", lambda v: 0 <= v < 100, "0 or more, below 100")
        wanted = "0, or at least 2 and at most 1024"
        check_field(self, "value_bins", lambda v: v == 0 or 2 <= v <= 1024, wanted)
        for name in ("value_range", "value_clip"):
            check_field(self, name, lambda v: v > 0, "above 0")
        for name in ("discount", "gae_lambda"):
            check_field(self, name, lambda v: 0 <= v <= 1, "in [0, 1]")


@dataclass(frozen=True)
class GrpoSettings(RolloutSettings):
    """Group relative policy optimisation (GRPO) and its variants, without a critic."""

    advantage: GroupAdvantage = "dr-grpo"
    """variant: how a prompt's completions are compared, and how losses are averaged"""
    num_completions: int = 8
    """completions per prompt"""
    max_resamples: int | None = None
    """times that prompts with equal rewards are replaced, per rollout; default 0, and 3 for dapo"""
    clip_high: float | None = None
    """clipping range of the probability ratio above 1; default 0.2, and 0.28 for dapo"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "num_completions", lambda v: v >= 2, "2 or more: they are compared")
        check_field(self, "max_resamples", lambda v: v >= 0, "0 or more")

    @property
    def highest_clip(self) -> float:
        """--clip-high, or its default for the variant."""
        higher = self.clip_high is None and self.advantage == "dapo"
        return 0.28 if higher else super().highest_clip

    @property
    def resample_limit(self) -> int:
        """--max-resamples, or its default for the variant."""
        return 3 * (self.advantage == "dapo") if self.max_resamples is None else self.max_resamples


@dataclass(frozen=True)
class RewardSettings(TrainSettings):
    """Training of a reward model on pairs or on ratings of single completions."""

    data: Path
    """bradley-terry: pairs, in the rows of dpo; the other losses: a .jsonl of prompt, response and
    rating, of scored responses, or of preference records"""
    loss: RewardLoss = "bradley-terry"
    """bradley-terry trains on pairs; the others on ratings: regression predicts the number, binned
    its bin, hl-gauss its bin too but with a Gaussian around the rating as target, so that near bins
    count as nearly right, ordinal the chance to be above each bin"""
    ensemble_size: int = 1
    """number of heads on the shared trunk; the reward is their mean"""
    pooling: Literal["last", "mean"] = "last"
    """a head reads the state of the last token, or the mean over all tokens"""
    segment_embeddings: bool = False
    """learned embeddings that mark tokens as prompt or completion, as in palm-rlhf-pytorch"""
    margin_scale: float = 0.0
    """bradley-terry: wanted reward difference per unit of a pair's margin"""
    centring_coef: float = 0.0
    """bradley-terry: coefficient of (r_w + r_l)^2, which keeps rewards around zero; try 0.01"""
    bins: int | None = None
    """binned, hl-gauss, ordinal: number of values from the lowest to the highest rating; default:
    every whole number, for hl-gauss with fractional ratings 21"""
    axis: str | None = None
    """axis to learn, in preference records with ratings on several axes"""

    def __post_init__(self) -> None:
        # Not at the top: --help reads this module and needs no model.
        from openpalm.model.config import MAX_BINS, MAX_MEMBERS

        super().__post_init__()
        check_field(self, "ensemble_size", lambda v: 1 <= v <= MAX_MEMBERS, f"1 to {MAX_MEMBERS}")
        for name in ("margin_scale", "centring_coef"):
            check_field(self, name, lambda v: 0 <= v < 1000, "0 or more, below 1000")
        _refuse_options_of_others(self, self.loss, _REWARD_LOSSES_OF)
        check_field(self, "bins", lambda v: 2 <= v <= MAX_BINS, f"2 to {MAX_BINS}")

    @property
    def reads_pairs(self) -> bool:
        """Whether the data is pairs, not ratings."""
        return self.loss == "bradley-terry"
