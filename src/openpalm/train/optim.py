"""Parameter groups, optimizers, and the learning rate as a function of the step.

The schedule is a pure function, so there is no schedule state to save.
"""

import math

import torch
from torch import Tensor, nn

from openpalm.train.config import OptimSettings


def learning_rate_factor(step: int, steps: int, settings: OptimSettings) -> float:
    """Share of the peak at `step` (from 1) of `steps`: linear warm-up, then a cosine."""
    warmup = round(settings.warmup * steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.final_lr + (1 - settings.final_lr) * cosine


class Optimizer:
    """One or two torch optimizers over one model, stepped together.

    State travels as named tensors, `<parameter>/<slot>`, whatever the optimizers are.
    """

    def __init__(self, model: nn.Module, settings: OptimSettings, lr: float):
        self.settings = settings
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        muon = [p for p in trained if settings.name == "muon" and self._suits_muon(p)]
        adamw = [p for p in trained if not any(p is other for other in muon)]
        self.parts: list[torch.optim.Optimizer] = [self._adamw(adamw, lr)]
        if muon:
            self.parts.append(self._muon(muon))
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def _suits_muon(self, parameter: nn.Parameter) -> bool:
        """Muon orthogonalises matrices that map states to states, not tables or reward heads."""
        return parameter.dim() == 2 and self.names[parameter].startswith("blocks.")

    def _adamw(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = [
            {
                "params": [p for p in parameters if p.dim() >= 2],
                "weight_decay": self.settings.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (self.settings.beta1, self.settings.beta2)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=self.settings.eps, fused=True)

    def _muon(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Muon(
            parameters, lr=self.settings.muon_lr, weight_decay=self.settings.weight_decay
        )

    def step(self, factor: float) -> None:
        """One update at `factor` times each group's peak learning rate; clears the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor
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
        """Takes back what `state_tensors` gave."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            # Counters too: the fused kernels want them beside their parameter.
            owner[parameter].state[parameter][slot] = value.to(parameter.device)
