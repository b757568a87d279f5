"""Optimizer settings: optimizer, learning rate and its schedule, weight decay, clipping."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from openpalm.base.settings import check

OptimizerName = Literal["adamw", "stable-adamw", "lion", "adafactor", "muon"]
DecayRule = Literal["fixed", "palm", "nanopalm"]

PUBLISHED: dict[OptimizerName, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
    "stable-adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1},
    "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3},
    "adafactor": {"beta1": 0.9, "eps": 1e-30, "weight_decay": 0.1},
    "muon": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1},
}
"""Each optimizer's published defaults for language models; muon's betas are its AdamW's."""

MUON_RATE = 0.02
LION_SHARE = 1 / 3
"""Lion's learning rate as a share of AdamW's, at three times the weight decay. Chen et al. 2023,
section 5, give a third to a tenth; in short runs on small batches a third was the best."""


def given(value: float | None) -> float:
    """A value that is never None in resolved settings."""
    assert value is not None
    return value


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and learning-rate schedule; unset values take the optimizer's own defaults."""

    name: OptimizerName | None = None
    """optimizer; muon trains the blocks' matrices and leaves the rest to adamw; default adamw,
    with --depth muon"""
    lr: float | None = None
    """peak learning rate; default: the preset's, for lion a third of it, for adafactor sqrt(dim)
    times it (adafactor's is relative to each parameter's root mean square)"""
    muon_lr: float | None = None
    """peak learning rate of the matrices that muon trains; default 0.02"""
    weight_decay: float | None = None
    """decoupled weight decay of matrices; norm scales and biases have none; default 0.1, lion 0.3,
    with --optim.decay-rule palm or nanopalm 1"""
    decay_rule: DecayRule | None = None
    """decay per step: weight_decay times lr (fixed), lr^2 (palm) or lr^3 (nanopalm); default
    fixed, adafactor palm"""
    beta1: float | None = None
    """decay of the first moment; default 0.9"""
    beta2: float | None = None
    """decay of the second moment, for lion of its only moment; default 0.95, stable-adamw and lion
    0.99; adafactor has none: it decays by 1 - k^-0.8 at step k"""
    eps: float | None = None
    """added to the root of the second moment; default 1e-8, stable-adamw 1e-6; adafactor adds it
    to the squared gradients, default 1e-30"""
    schedule: Literal["cosine", "linear", "wsd", "palm"] = "cosine"
    """learning-rate schedule after the warm-up: cosine; linear; wsd, constant and then a linear
    cooldown; palm, constant for 4 % of the steps and then falling as 1/sqrt(step)"""
    warmup: float | None = None
    """warm-up: share of the steps in which the learning rate rises from zero; default 0.05, palm
    0"""
    anneal: float | None = None
    """share of the steps in which cosine and linear fall, after the warm-up; then the learning rate
    stays at --optim.final-lr; default: all the steps that are left"""
    cooldown: float = 0.2
    """cooldown of wsd: share of the steps in which the learning rate falls"""
    final_lr: float = 0.1
    """learning rate at the end of cosine, linear and wsd, as a share of the peak"""
    clip: float = 1.0
    """gradient clipping: largest global norm of the gradient"""

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
        fits = self.anneal is None or 0 < self.anneal < 1e6
        check(fits, "optim.anneal", self.anneal, "above 0")
        fits = self.anneal is None or self.schedule in ("cosine", "linear")
        check(fits, "optim.anneal", self.anneal, f"left out: {self.schedule} has none")
        check(self.clip > 0, "optim.clip", self.clip, "above 0")

    @property
    def kind(self) -> OptimizerName:
        """The optimizer's name."""
        return self.name or "adamw"

    @property
    def warm(self) -> float:
        """Warm-up as a share of the steps."""
        if self.warmup is not None:
            return self.warmup
        return 0.0 if self.schedule == "palm" else 0.05

    @property
    def rule(self) -> DecayRule:
        """The weight-decay rule."""
        return self.decay_rule or ("palm" if self.kind == "adafactor" else "fixed")

    def resolved(self) -> "OptimSettings":
        """These settings with every default filled in."""
        own: dict[str, Any] = PUBLISHED[self.kind] | {"name": self.kind, "muon_lr": MUON_RATE}
        own |= {"decay_rule": self.rule, "warmup": self.warm}
        if self.rule != "fixed":
            own["weight_decay"] = 1.0
        return replace(self, **{n: v for n, v in own.items() if getattr(self, n) is None})

    def peak(self, adamw_rate: float, dim: int) -> float:
        """The peak learning rate, from the rate that suits AdamW and the model's width `dim`.

        Matrices start with a root mean square of 1/sqrt(dim). Adafactor's step is relative to it:
        sqrt(dim) times AdamW's rate is the same step, and at PaLM's sizes gives about its 1e-2.
        """
        if self.lr is not None:
            return self.lr
        return adamw_rate * {"lion": LION_SHARE, "adafactor": dim**0.5}.get(self.kind, 1.0)
