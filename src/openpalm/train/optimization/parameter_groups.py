"""Parameter groups and the optimizer of a model: weight decay, clipping, state as named tensors."""

from collections.abc import Set

import torch
from torch import Tensor, nn

from openpalm.base.device import multiplies_bfloat16
from openpalm.parallel.world import world
from openpalm.train.optimization.listwise import Listwise
from openpalm.train.optimization.optimizers import Adafactor, AdamW, Lion, Muon, StableAdamW
from openpalm.train.optimization.schedule import decay_coefficient
from openpalm.train.optimization.shards import local_gradient, local_part_like, squared_norm
from openpalm.train.optimizer_settings import OptimSettings, given


class Optimizer:
    """The optimizer of a model: one torch optimizer, or Muon and AdamW stepped together.

    Its state is a dict of tensors named `<parameter>/<slot>`, the same for every optimizer. Every
    process holds, and updates, its parts of sharded parameters.
    """

    def __init__(
        self, model: nn.Module, settings: OptimSettings, lr: float, *, offload: bool = False
    ):
        """offload: keep the moments of parameters on a GPU in the CPU's memory."""
        self.settings = settings = settings.resolved()
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        muon = [p for p in trained if settings.kind == "muon" and self._suits_muon(p)]
        others = [p for p in trained if not any(p is other for other in muon)]
        # The moments come to the parameters rather than the update to the CPU: it is then the same
        # kernel, with the same result, and Muon multiplies matrices, for which a CPU is too slow.
        self.offload = offload and any(p.device.type != "cpu" for p in trained)
        self.uncounted: list[nn.Parameter] = []
        """parameters that another pipeline stage counts in the gradient norm: a tied table"""
        self.parts: list[Listwise] = [self._main(others, lr)]
        if muon:
            rate = given(settings.muon_lr)
            native = multiplies_bfloat16(muon[0].device)
            dtype = torch.bfloat16 if native else torch.float32
            groups = [{"params": muon, "decays": True}]
            self.parts.append(Muon(groups, rate, dtype=dtype, offload=self.offload))
        for part in self.parts:
            for group in part.param_groups:
                group["peak_lr"] = group["lr"]

    def _suits_muon(self, parameter: nn.Parameter) -> bool:
        """Whether it is a matrix of a block: Muon is not meant for embeddings or reward heads."""
        return parameter.dim() == 2 and self.names[parameter].startswith("blocks.")

    def _main(self, parameters: list[nn.Parameter], lr: float) -> Listwise:
        """The optimizer of all parameters that Muon does not train; vectors do not decay."""
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "decays": True},
            {"params": [p for p in parameters if p.dim() < 2], "decays": False},
        ]
        named = ("beta1", "beta2", "eps")
        own = {n: v for n in named if (v := getattr(self.settings, n)) is not None}
        kinds = {"stable-adamw": StableAdamW, "lion": Lion, "adafactor": Adafactor}
        kind = kinds.get(self.settings.kind, AdamW)
        return kind(groups, lr, offload=self.offload, **own)

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

    def clip(self, loss_scale: float = 1.0) -> float:
        """Clips the gradient to the norm `settings.clip`; returns its norm before that.

        The norm is that of the whole model: over all parts and pipeline stages, every weight once.
        loss_scale: by which the loss was multiplied; the gradient is divided by it first.
        """
        if loss_scale != 1:
            self._multiply_gradients(1 / loss_scale)
        if world().size == 1:
            return float(nn.utils.clip_grad_norm_(self.names, self.settings.clip))
        [square] = world().sums_over_all([squared_norm(self.names, self.uncounted)])
        norm = square**0.5
        if (shrink := self.settings.clip / (norm + 1e-6)) < 1:
            self._multiply_gradients(shrink)
        return norm

    def _multiply_gradients(self, factor: float) -> None:
        gradients = [local_gradient(p) for p in self.names if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)  # type: ignore[reportPrivateImportUsage]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every moment and counter as `<parameter>/<slot>`."""
        return {
            f"{self.names[parameter]}/{slot}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for slot, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores `state_tensors`: whole tensors or sharded ones, cut in this or another way.

        Raises KeyError or ValueError for other tensors.
        """
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        for key, value in tensors.items():
            name, slot = key.rsplit("/", 1)
            parameter = by_name[name]
            if value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
            state = owner[parameter].state[parameter]
            if slot == "step":
                state[slot] = value.to("cpu", torch.int64)
            else:
                state[slot] = owner[parameter].kept(local_part_like(value, parameter), parameter)

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
                for slot in ("step", *part.slots):
                    key = f"{name}/{slot}"
                    taken[key] = _fitting(key, tensors.get(key), parameter)
        self.load_state_tensors(taken)
        return new


def _fitting(key: str, value: Tensor | None, parameter: Tensor) -> Tensor:
    """A moment in its parameter's dtype, or a step count. Raises ValueError."""
    if value is None:
        raise ValueError(f"{key} is missing")
    if key.endswith("/step"):
        if value.numel() != 1 or float(value) < 0 or not float(value).is_integer():
            raise ValueError(f"{key} is {value.tolist()}, not a count")
        return value.reshape(())
    if value.shape != parameter.shape or not value.is_floating_point():
        raise ValueError(f"{key} is {list(value.shape)}, not {list(parameter.shape)}")
    return value.to(parameter.dtype)
