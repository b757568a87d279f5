"""Parameter groups and the optimizer of a model: weight decay, clipping, state as named tensors."""

from collections.abc import Set

import torch
from torch import Tensor, nn

from openpalm.base.device import multiplies_bfloat16
from openpalm.model.sharding import sharded_like, whole
from openpalm.train.optimization.optimizers import Adafactor, Lion, Listwise, Muon, StableAdamW
from openpalm.train.optimization.schedule import decay_coefficient
from openpalm.train.optimizer_settings import OptimSettings, given


class Optimizer:
    """The optimizer of a model: one torch optimizer, or Muon and AdamW stepped together.

    Its state is a dict of tensors named `<parameter>/<slot>`, the same for every optimizer.
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
        """Whether it is a matrix of a block: Muon is not meant for embeddings or reward heads."""
        return parameter.dim() == 2 and self.names[parameter].startswith("blocks.")

    def _main(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The optimizer of all parameters that Muon does not train; vectors do not decay."""
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
        """Clips the gradient to the norm `settings.clip`; returns its norm before that."""
        return float(whole(nn.utils.clip_grad_norm_(self.names, self.settings.clip)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Every moment and counter as `<parameter>/<slot>`."""
        return {
            f"{self.names[parameter]}/{slot}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for slot, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores `state_tensors`. Raises KeyError or ValueError for other tensors."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
            # Step counters too: torch's fused kernels need them on the device, ours on the CPU.
            stays = slot == "step" and isinstance(owner[parameter], Listwise)
            place = value.device if stays else parameter.device
            value = sharded_like(value, parameter) if value.dim() else value
            owner[parameter].state[parameter][slot] = value.to(place)

    def take_over(self, tensors: dict[str, Tensor], names: Set[str]) -> list[str]:
        """Continues with the moments and step counts that another run gave the parameters `names`.

        `tensors` are its `state_tensors`. Returns the trained parameters not in `names`;
        their state is new. Raises ValueError naming a tensor that is missing or does not fit.
        """
        taken, new = dict[str, Tensor](), []
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                name = self.names[parameter]
                if name not in names:
                    new.append(name)
                    continue
                for slot in ("step", *_moments(part)):
                    key = f"{name}/{slot}"
                    taken[key] = _fitting(key, tensors.get(key), part, parameter)
        self.load_state_tensors(taken)
        return new


def _moments(part: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the moments of a part's parameters."""
    return part.slots if isinstance(part, Listwise) else ("exp_avg", "exp_avg_sq")


def _fitting(
    key: str, value: Tensor | None, part: torch.optim.Optimizer, parameter: Tensor
) -> Tensor:
    """A moment, or a step count, in the dtype that `part` keeps it in. Raises ValueError."""
    if value is None:
        raise ValueError(f"{key} is missing")
    if key.endswith("/step"):
        if value.numel() != 1 or float(value) < 0 or not float(value).is_integer():
            raise ValueError(f"{key} is {value.tolist()}, not a count")
        whole = isinstance(part, Listwise)
        return value.reshape(()).to(torch.int64 if whole else torch.float32)
    if value.shape != parameter.shape or not value.is_floating_point():
        raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
    return value.to(parameter.dtype)
