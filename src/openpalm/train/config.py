"""The settings of a training run, checked at birth."""

import math
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from openpalm.base.settings import spell
from openpalm.errors import SettingsError
from openpalm.model.config import LORA_TARGETS, LoraConfig, ModelConfig

PROBES_A_RUN = 10
"""Evaluations and checkpoints of a run whose settings do not say how many."""
LEAST_STEPS_APART = 20
"""Between two of them, where the settings do not say."""
_STAGE = re.compile(r"([1-9]\d{0,3}/[1-9]\d{0,3})@(0?\.\d{1,9})")
"""of a ramp: a share and a place"""


NO_INIT = (
    "--init is missing: name the run or checkpoint to fine-tune, such as --init runs/tiny; "
    "`openpalm train` makes one from text"
)


def given(value: float | None) -> float:
    """A value that resolved settings have."""
    assert value is not None
    return value


def check(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raises SettingsError that names the option, its value and what is wanted."""
    if not condition:
        raise SettingsError(f"{spell(name)} {value}: must be {wanted}")


OptimizerName = Literal["adamw", "stable-adamw", "lion", "adafactor", "muon"]
DecayRule = Literal["fixed", "palm", "nanopalm"]

PUBLISHED: dict[OptimizerName, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "stable-adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3},
    "adafactor": {"beta1": 0.9, "eps": 1e-30, "weight_decay": 0.1},
    "muon": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
}
"""What each optimizer's authors take for a language model; muon's betas are its AdamW's."""

MUON_RATE = 0.02
LION_SHARE = 1 / 3
"""of AdamW's learning rate, at three times the decay: Chen et al. 2023, section 5, give a third to
a tenth, and in short runs on small batches the largest was the best"""


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and its schedule; what is not set takes the named optimizer's own default."""

    name: OptimizerName | None = None
    """muon is for the blocks' matrices, with adamw for the rest; adafactor is PaLM's; not set is
    adamw, with --depth muon"""
    lr: float | None = None
    """peak learning rate; not set takes the model preset's (lion a third of it, adafactor
    sqrt(dim) times it, relative to each parameter's root mean square)"""
    muon_lr: float | None = None
    """peak learning rate of muon's matrices; not set is 0.02"""
    weight_decay: float | None = None
    """decoupled decay of matrices, norm scales and biases never decay; not set is 0.1 (lion 0.3),
    or 1 with another --optim.decay-rule than fixed"""
    decay_rule: DecayRule | None = None
    """a step shrinks matrices by weight_decay times lr (fixed), its square (palm; adafactor's
    where not set) or its cube (nanopalm)"""
    beta1: float | None = None
    """decay of the first moment; not set is 0.9"""
    beta2: float | None = None
    """decay of the second moment (of lion's only one); not set is 0.95, stable-adamw and lion
    0.99; adafactor's is 1 - k^-0.8 at step k"""
    eps: float | None = None
    """added to the root of the second moment; not set is 1e-8, stable-adamw 1e-6; adafactor adds
    1e-30 to the squares"""
    schedule: Literal["cosine", "linear", "wsd", "palm"] = "cosine"
    """after the warm-up: a cosine, a line, constant until the cooldown (wsd), or constant for 4 %
    of the steps and then falling as 1/sqrt(step) (palm)"""
    warmup: float | None = None
    """share of the steps over which the learning rate rises from zero; not set is 0.05, palm 0"""
    cooldown: float = 0.2
    """share of the steps over which wsd falls in a line"""
    final_lr: float = 0.1
    """share of the peak learning rate that cosine, linear and wsd end at"""
    clip: float = 1.0
    """largest global norm of the gradient"""

    def __post_init__(self) -> None:
        check(self.lr is None or 0 < self.lr < 10, "optim.lr", self.lr, "above 0 and below 10")
        muon_lr = self.muon_lr
        check(muon_lr is None or 0 < muon_lr < 10, "optim.muon_lr", muon_lr, "above 0 and below 10")
        for name in ("beta1", "beta2", "eps"):
            value, own = getattr(self, name), name in PUBLISHED[self.kind]
            check(value is None or own, f"optim.{name}", value, f"left out: {self.kind} has none")
            fits = value is None or (value > 0 if name == "eps" else 0 <= value < 1)
            check(fits, f"optim.{name}", value, "above 0" if name == "eps" else "in [0, 1)")
        for name in ("weight_decay", "warmup", "final_lr", "cooldown"):
            value = getattr(self, name)
            closed = name != "weight_decay" or self.rule != "fixed"
            fits = value is None or 0 <= value < 1 or (value == 1 and closed)
            check(fits, f"optim.{name}", value, f"in [0, 1{']' if closed else ')'}")
        fits = self.schedule != "wsd" or self.warm + self.cooldown <= 1
        room = f"at most 1 - warmup ({1 - self.warm:g})"
        check(fits, "optim.cooldown", self.cooldown, room)
        check(self.clip > 0, "optim.clip", self.clip, "above 0")

    @property
    def kind(self) -> OptimizerName:
        """Which optimizer it is."""
        return self.name or "adamw"

    @property
    def warm(self) -> float:
        """The warm-up's share of the steps."""
        if self.warmup is not None:
            return self.warmup
        return 0.0 if self.schedule == "palm" else 0.05

    @property
    def rule(self) -> DecayRule:
        """How far a step shrinks matrices."""
        return self.decay_rule or ("palm" if self.kind == "adafactor" else "fixed")

    def resolved(self) -> "OptimSettings":
        """With the defaults in place of what was not set."""
        own: dict[str, Any] = PUBLISHED[self.kind] | {"name": self.kind, "muon_lr": MUON_RATE}
        own |= {"decay_rule": self.rule, "warmup": self.warm}
        if self.rule != "fixed":
            own["weight_decay"] = 1.0
        return replace(self, **{n: v for n, v in own.items() if getattr(self, n) is None})

    def peak(self, adamw_rate: float, dim: int) -> float:
        """The peak learning rate for a model of that width which suits AdamW's `adamw_rate`.

        Matrices start with a root mean square of 1/sqrt(dim), so Adafactor's relative step is then
        AdamW's; at PaLM's sizes that gives about its 1e-2.
        """
        if self.lr is not None:
            return self.lr
        return adamw_rate * {"lion": LION_SHARE, "adafactor": dim**0.5}.get(self.kind, 1.0)


@dataclass(frozen=True)
class ArchSettings:
    """Changes to the preset's architecture; what is not set stays as the preset has it."""

    init: Literal["default", "palm"] | None = None
    """of fresh weights: palm has embeddings of deviation 1 and logits scaled by 1/sqrt(dim)"""
    dim: int | None = None
    """width of the residual stream"""
    depth: int | None = None
    """blocks"""
    heads: int | None = None
    """query heads"""
    head_dim: int | None = None
    """width of one head"""
    ff_dim: int | None = None
    """hidden width of the feed-forward branch"""
    kv_heads: int | None = None
    """key/value heads: 1 is multi-query, as many as heads is multi-head"""
    qk_norm: bool | None = None
    """RMS norm on queries and keys"""
    xpos_base: float | None = None
    """xPos decay base (512 in palm-rlhf-pytorch); 0 is plain rotary"""
    dropout: float | None = None
    """probability of zeroing a coordinate of a block's output"""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter, trained in place of the weights (Hu et al. 2021)."""

    rank: int = 0
    """of the adapter, 8 or 16 as a rule; 0 trains the weights themselves"""
    alpha: float = 32.0
    """scales what it adds, by alpha / rank: the best learning rate then hardly depends on rank"""
    targets: str = "all"
    """matrices that are adapted: all, or some of q,k,v,gate,up,out,down"""

    def __post_init__(self) -> None:
        check(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        check(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "above 0 and finite")
        known = self.targets == "all" or {*self._names} <= {*LORA_TARGETS}
        once = len({*self._names}) == len(self._names)
        wanted = f"all, or some of {','.join(LORA_TARGETS)}, each once"
        check(known and once, "lora.targets", self.targets, wanted)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.targets.split(","))

    def config(self, model: ModelConfig) -> LoraConfig | None:
        """The adapter of such a model, or None. Raises SettingsError where it cannot have it.

        By default every matrix is adapted: queries and values alone, as in the paper, learn
        less (Dettmers et al. 2023, QLoRA, figure 2; Schulman et al. 2025, LoRA Without Regret).
        """
        if self.rank == 0:
            return None
        names = tuple(model.matrices) if self.targets == "all" else self._names
        config = LoraConfig(self.rank, self.alpha, names)
        config.check(model)
        return config


LOGGERS = ("tensorboard", "wandb")


def logger_names(log: str | None) -> list[str]:
    """The loggers that --loggers names, each once."""
    return [*dict.fromkeys(name.strip() for name in log.split(","))] if log is not None else []


@dataclass(frozen=True)
class ProfileSettings:
    """A trace of some steps into RUN/profile, with the operators that take most time."""

    steps: int | None = None
    """how many, after three to warm up; not set traces none"""

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, "profile.steps", self.steps, "1 or more")


@dataclass(frozen=True)
class MemorySettings:
    """Memory for time; the weights come out the same."""

    recompute: Literal["none", "selective", "full"] = "none"
    """what the backward pass computes again: nothing, all but large matrices, or whole blocks"""
    loss_chunk: int | None = None
    """positions whose logits are in memory at a time; not set takes as many as are quick"""
    keep_freed: bool | None = None
    """whether freed memory stays with the process (Linux, glibc): faster steps, gaps in memory;
    not set keeps it where nothing is recomputed"""

    @property
    def keeps_freed(self) -> bool:
        return self.recompute == "none" if self.keep_freed is None else self.keep_freed

    def __post_init__(self) -> None:
        chunk = self.loss_chunk
        check(chunk is None or chunk >= 1, "memory.loss_chunk", chunk, "1 or more")


@dataclass(frozen=True)
class Chosen:
    """What was chosen by measuring before step 1; written by the run, read back on resume."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """the faster one on this machine, where --dtype is auto"""
    steps: int | None = None
    """steps that fit --minutes"""
    minutes: float | None = None
    """the --minutes that they fit"""
    eval_every: int | None = None
    """steps between evaluations, so that they take little of --minutes"""
    peak_flops: float | None = None
    """measured matrix-multiply rate in FLOP/s, for the share of peak"""
    data: str | None = None
    """hash of the data, so that other data under the same name is noticed"""
    parent: str | None = None
    """hash of the checkpoint that --init started from"""
    reward: str | None = None
    """hash of the files behind --reward and --gold-reward"""

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "minutes", "peak_flops"):
            value = getattr(self, name)
            fits = value is None or 0 < value < math.inf
            check(fits, f"chosen.{name}", value, "above 0 and finite")


@dataclass(frozen=True)
class TrainSettings:
    """A training run: what to train, on what, for how long, and where to keep it."""

    data: Path
    """a directory of `openpalm data prepare`, or a .yaml of several; for sft a .jsonl of
    conversations, dpo of pairs"""
    out: Path
    """directory of the run; the same command goes on where it stopped"""
    model: str | None = None
    """preset, see `openpalm models`; may be left out with --init"""
    init: str | None = None
    """checkpoint, run or hub name to take the weights from, with a fresh optimizer"""
    steps: int | None = None
    """optimizer steps"""
    minutes: float | None = None
    """instead of --steps: as many as fit, measured before the first one"""
    epochs: float | None = None
    """instead of --steps: passes over the data"""
    seed: int = 0
    """of the initial weights, the order of the data and dropout"""
    sequence_length: int | None = None
    """tokens in a sequence; not set takes the preset's context"""
    batch_tokens: int | None = None
    """tokens in a step over all microbatches and processes; not set is 16 sequences"""
    batch_ramp: str | None = None
    """smaller batches first, such as 1/4@0.1,1/2@0.3: a quarter of --batch-tokens for the first
    tenth of the steps, half until three tenths; not set is whole batches throughout"""
    microbatch_tokens: int = 8192
    """tokens in memory at a time; a step accumulates as many microbatches as it needs"""
    save_every: int | None = None
    """steps between checkpoints; not set is ten a run, at least 20 steps apart"""
    eval_every: int | None = None
    """steps between evaluations; not set is ten a run, at least 20 steps apart"""
    keep_checkpoints: int = 3
    """newest checkpoints to keep; 0 keeps all"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the arithmetic (weights stay float32); auto takes the faster one here"""
    max_skipped_steps: int = 10
    """steps in a row without a finite loss and gradient before the run stops"""
    last_layers: int | None = None
    """train only so many of the last blocks, and the final norm; not set trains everything"""
    z_loss: float = 0.0
    """weight of log^2 Z beside the cross entropy (PaLM: 1e-4); keeps logits from drifting"""
    compile: bool = False
    """torch.compile of each block: a minute or two before the first step, for GPUs"""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """what is kept for the backward pass"""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """a low-rank adapter in place of the weights"""
    arch: ArchSettings = field(default_factory=ArchSettings)
    """changes to the preset"""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """optimizer and schedule"""
    loggers: str | None = None
    """loggers that get the run's rows too: tensorboard, wandb, or both with a comma between"""
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    """a trace of some steps"""
    chosen: Chosen = field(default_factory=Chosen)
    """filled in by the run"""

    def __post_init__(self) -> None:
        # Here, not in OptimSettings: a file or an option may still change its optimizer's name.
        if self.dial is None:
            object.__setattr__(self, "optim", self.optim.resolved())
        if self.model is None and self.init is None and self.dial is None:
            raise SettingsError(self.without_start)
        if self.lengths != 1 and not (self.lengths == 0 and self.dial is not None):
            raise SettingsError("give exactly one of --steps, --minutes and --epochs")
        if self.lora.rank and self.last_layers is not None:
            raise SettingsError("give --lora.rank or --last-layers, not both")
        for name in (
            *("steps", "minutes", "epochs", "sequence_length", "save_every", "eval_every"),
            "last_layers",
        ):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, name, value, "above 0 and finite")
        check(self.microbatch_tokens > 0, "microbatch_tokens", self.microbatch_tokens, "above 0")
        check(0 <= self.z_loss < 1, "z_loss", self.z_loss, "in [0, 1)")
        Ramp.parse(self.batch_ramp)
        check(self.keep_checkpoints >= 0, "keep_checkpoints", self.keep_checkpoints, "0 or more")
        known = {*logger_names(self.loggers)} <= {*LOGGERS}
        check(
            known, "loggers", self.loggers, f"{' or '.join(LOGGERS)}, or both with a comma between"
        )
        check(self.max_skipped_steps >= 1, "max_skipped_steps", self.max_skipped_steps, "1 or more")
        check(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit whole number")
        check(
            self.batch_tokens is None or self.batch_tokens > 0,
            "batch_tokens",
            self.batch_tokens,
            "above 0",
        )

    @property
    def dial(self) -> int | None:
        """--depth, of runs that have it."""
        return None

    @property
    def without_start(self) -> str:
        """What is said where nothing tells which model to train."""
        return NO_INIT

    @property
    def lengths(self) -> int:
        """How many options say how long the run is."""
        return sum(length is not None for length in (self.steps, self.minutes, self.epochs))

    @property
    def trains_all(self) -> bool:
        """Whether every weight learns."""
        return not self.lora.rank and self.last_layers is None


@dataclass(frozen=True)
class PretrainSettings(TrainSettings):
    """A run on prepared text: one dataset, or a mixture of several."""

    depth: int | None = None
    """instead of --model, the one dial: so many blocks; width, heads, batch, learning rates, decay
    and steps then follow by rules, are printed, and give way to options of their own"""
    document_mask: bool = False
    """attention stays inside documents, in training and validation"""
    force: bool = False
    """with --init: train on data of another tokenizer than the model's"""
    sample_prompts: list[str] | str | None = None
    """texts that samples.jsonl continues, several as a JSON list; not set takes the beginnings of
    some validation documents"""

    def __post_init__(self) -> None:
        check(self.depth is None or self.depth > 0, "depth", self.depth, "above 0 and finite")
        if self.depth is not None and (self.model or self.init or self.arch.depth):
            raise SettingsError("give --depth alone, without --model, --init or --arch.depth")
        super().__post_init__()

    @property
    def dial(self) -> int | None:
        return self.depth

    @property
    def without_start(self) -> str:
        return "give --model (see `openpalm models`) or --init"


@dataclass(frozen=True)
class Ramp:
    """How batches grow: each stage is a share of the whole batch, until a share of the steps."""

    stages: tuple[tuple[Fraction, float], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> "Ramp":
        """Reads `1/4@0.1,1/2@0.3`. Raises SettingsError unless shares and places rise below 1."""
        parts = [] if text is None else [_STAGE.fullmatch(part) for part in text.split(",")]
        stages = [(Fraction(p[1]), float(p[2])) if p else (Fraction(0), 0.0) for p in parts]
        rising = all(
            a < b for side in zip(*stages, strict=True) for a, b in pairwise((0, *side, 1))
        )
        wanted = "SHARE@UNTIL, both rising and between 0 and 1, such as 1/4@0.1,1/2@0.3"
        check(rising, "batch_ramp", text, wanted)
        return cls(tuple(stages))

    def share(self, step: int, steps: int) -> Fraction:
        """Of the whole batch that `step` (from 1) of `steps` takes."""
        reached = (share for share, until in self.stages if step <= round(until * steps))
        return next(reached, Fraction(1))

    @property
    def mean(self) -> float:
        """Of the shares over all steps."""
        ends = [0.0, *(until for _, until in self.stages), 1.0]
        shares = [*(share for share, _ in self.stages), Fraction(1)]
        pieces = zip(shares, pairwise(ends), strict=True)
        return sum(float(share) * (end - start) for share, (start, end) in pieces)


@dataclass(frozen=True)
class BatchShape:
    """How a step's tokens are cut: `accumulation` microbatches of `rows` sequences a process."""

    sequence_length: int
    rows: int
    accumulation: int
    ramp: Ramp = Ramp()
    """of the number of microbatches; the figures here are of a whole batch"""

    @property
    def sequences(self) -> int:
        """Of one process in a step."""
        return self.rows * self.accumulation


def batch_shape(settings: TrainSettings, sequence_length: int, processes: int = 1) -> BatchShape:
    """Cuts the global batch. Raises SettingsError where the numbers do not divide."""
    wanted = settings.batch_tokens or 16 * sequence_length * processes
    if wanted % (sequence_length * processes):
        raise SettingsError(
            f"--batch-tokens {wanted}: must be a multiple of sequence_length x processes "
            f"({sequence_length} x {processes})"
        )
    sequences = wanted // (sequence_length * processes)
    ramp = Ramp.parse(settings.batch_ramp)
    parts = [sequences * share for share, _ in ramp.stages]
    if any(part.denominator > 1 for part in parts):
        multiple = math.lcm(*(share.denominator for share, _ in ramp.stages))
        raise SettingsError(
            f"--batch-ramp {settings.batch_ramp}: does not cut {sequences} sequences a process "
            f"whole; take --batch-tokens a multiple of {multiple * sequence_length * processes}"
        )
    room = max(1, settings.microbatch_tokens // sequence_length)
    whole = math.gcd(sequences, *(int(part) for part in parts))
    rows = max(r for r in range(1, min(room, whole) + 1) if whole % r == 0)
    return BatchShape(sequence_length, rows, sequences // rows, ramp)
