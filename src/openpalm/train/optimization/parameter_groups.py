"""Parameter groups, optimizers, and the learning rate as a function of the step.

The schedule is a pure function, so there is no schedule state to save.
"""

import math

import torch
from torch import Tensor, nn

from openpalm.base.device import multiplies_bfloat16
from openpalm.train.config import OptimSettings, given
from openpalm.train.optimization.optimizers import Adafactor, Lion, Listwise, Muon, StableAdamW

PALM_HOLD = 10_000 / 255_000
"""Share of its steps that PaLM kept its learning rate constant for (section 5)."""


def learning_rate_factor(step: int, steps: int, settings: OptimSettings) -> float:
    """Share of the peak at `step` (from 1) of `steps`: a linear warm-up, then the schedule.

    The only step of a run is at the peak: a schedule that ends at zero would leave it nothing.

    palm is PaLM's min(1, sqrt(h / step)), whose h of 10,000 is here the same share of the run.
    """
    if steps == 1:
        return 1.0
    warmup = round(settings.warm * steps)
    if step <= warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    match settings.schedule:
        case "palm":
            return min(1.0, (max(1, warmup, PALM_HOLD * steps) / step) ** 0.5)
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            share = 1 - progress
        case "wsd":
            falling = round(settings.cooldown * steps)
            share = min(1.0, max(0, steps - step) / falling) if falling else 1.0
    return settings.final_lr + (1 - settings.final_lr) * share


def decay_coefficient(lr: float, settings: OptimSettings) -> float:
    """What decoupled decay multiplies with the learning rate `lr` of this moment.

    PaLM shrinks by lr^2 a step (section 5, in T5X so); nanoPALM gives its AdamW, which multiplies
    by lr once more, that square.
    """
    powers = {"fixed": 0, "palm": 1, "nanopalm": 2}
    return given(settings.weight_decay) * lr ** powers[settings.rule]


class Optimizer:
    """One or two torch optimizers over one model, stepped together.

    State travels as named tensors, `<parameter>/<slot>`, whatever the optimizers are.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, lr: float):
        self.settings = settings = settings.resolved()
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        muon = [p for p in trained if settings.kind == "muon" and self._suits_muon(p)]
        others = [p for p in trained if not any(p is other for other in muon)]
        self.parts: list[torch.optim.Optimizer] = [self._main(others, lr)]
        if muon:
            rate = given(settings.muon_lr)
            native = multiplies_bfloat16(muon[0].device)
            dtype = torch.bfloat16 if native else torch.float32
            self.parts.append(Muon([{"params": muon, "decays": True}], rate, dtype=dtype))
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def _suits_muon(self, parameter: nn.Parameter) -> bool:
        """Muon orthogonalises matrices that map states to states, not tables or reward heads."""
        return parameter.dim() == 2 and self.names[parameter].startswith("blocks.")

    def _main(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """Of all parameters, but for those that Muon takes."""
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
            {"params": [p for p in parameters if p.dim() < 2], "decays": False},
        ]
        beta1, beta2, eps = self.settings.beta1, self.settings.beta2, self.settings.eps
        match self.settings.kind:
            case "stable-adamw":
                return StableAdamW(groups, lr, beta1=beta1, beta2=beta2, eps=eps)
            case "lion":
                return Lion(groups, lr, beta1=beta1, beta2=beta2)
            case "adafactor":
                return Adafactor(groups, lr, beta1=beta1, eps=eps)
            case "adamw" | "muon":
                betas = given(beta1), given(beta2)
                return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=given(eps), fused=True)

    def step(self, factor: float) -> None:
        """One update at `factor` times each group's peak learning rate; clears the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                lr = group["lr"] = group["peak_lr"] * factor
                group["weight_decay"] = group["decays"] * decay_coefficient(lr, self.settings)
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scales the gradient to at most `settings.clip`; returns its norm before."""
        return float(nn.utils.clip_grad_norm_(self.names, self.settings.clip))

    def state_tensors(self) -> dict[str, Tensor]:
        """Every moment and counter as `<parameter>/<slot>`."""
        return {
            f"{self.names[parameter]}/{slot}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for slot, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state_tensors` gave. Raises KeyError or ValueError for anything else."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
            # Counters too: the fused kernels want them beside their parameter, ours on the CPU.
            stays = slot == "step" and isinstance(owner[parameter], Listwise)
            place = value.device if stays else parameter.device
            owner[parameter].state[parameter][slot] = value.to(place)
