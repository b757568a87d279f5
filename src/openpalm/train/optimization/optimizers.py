"""The optimizers that torch does not have: StableAdamW, Lion, PaLM's Adafactor, and a Muon that
iterates in a number format of the caller's choice.

Each is one `update` of whole lists of tensors, which a GPU runs as a few kernels. All state is in
named tensors beside its parameter: moments, and how many steps that parameter has taken. Weight
decay is decoupled everywhere: it shrinks by the learning rate times `weight_decay`.
"""

# pyright: reportPrivateImportUsage=false
# (torch's operations on lists have no public names; its own optimizers are made of them.)

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

SCALE_FLOOR = 1e-3
"""Least root mean square that Adafactor takes a parameter for, so that zeros can leave zero."""


class Listwise(torch.optim.Optimizer):
    """Steps its parameters together; those that were stepped less often than others, apart."""

    slots: ClassVar[tuple[str, ...]]
    """names of the moments, each of its parameter's shape"""

    def __init__(self, params: Iterable[Any], lr: float, **defaults: Any):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0} | defaults)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for step, parameters in self._of_equal_age(group["params"]).items():
                # A processor's cache holds what one tensor needs, not what all of them do.
                on_cpu = parameters[0].device.type == "cpu"
                for some in [[p] for p in parameters] if on_cpu else [parameters]:
                    gradients = [p.grad for p in some if p.grad is not None]
                    moments = [[self.state[p][slot] for p in some] for slot in self.slots]
                    self.update(group, step, some, gradients, *moments)

    def _of_equal_age(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """Those with a gradient, by the number (from 1) of the step that they take now."""
        ages = defaultdict[int, list[Tensor]](list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)  # on the CPU: it is read
                state |= {slot: torch.zeros_like(parameter) for slot in self.slots}
            state["step"] += 1
            ages[int(state["step"])].append(parameter)
        return ages

    def update(
        self,
        group: dict[str, Any],
        step: int,
        parameters: list[Tensor],
        gradients: list[Tensor],
        *moments: list[Tensor],
    ) -> None:
        """Changes parameters and moments in place."""
        raise NotImplementedError


class StableAdamW(Listwise):
    """AdamW that slows down a tensor whose gradient outgrew its second moment.

    Source: Wortsman et al. 2023 (arXiv 2304.13013), algorithm 2: betas debiased in place of the
    moments, and the rate of each tensor divided by max(1, RMS of g^2 / max(v, eps^2)).
    """

    slots = ("exp_avg", "exp_avg_sq")

    def update(self, group, step, parameters, gradients, *moments):
        (first, second), eps = moments, group["eps"]
        beta1, beta2 = (_debiased(group[name], step) for name in ("beta1", "beta2"))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(second)
        ratios = torch._foreach_div(gradients, torch._foreach_clamp_min(roots, eps))
        sizes = [p.numel() ** 0.5 for p in parameters]
        rms = torch._foreach_div(torch._foreach_norm(ratios), sizes)
        rates = group["lr"] / torch.stack(rms).clamp_min(1)
        torch._foreach_mul_(parameters, (1 - rates * group["weight_decay"]).unbind())
        torch._foreach_add_(roots, eps)
        torch._foreach_div_(roots, rates.unbind())
        torch._foreach_addcdiv_(parameters, first, roots, -1)


def _debiased(beta: float, step: int) -> float:
    """beta (1 - beta^(t-1)) / (1 - beta^t): the moment is then a weighted mean from step 1 on."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


class Lion(Listwise):
    """The sign of a momentum that the newest gradient counts more in (Chen et al. 2023).

    Source: arXiv 2302.06675, algorithm 2.
    """

    slots = ("exp_avg",)

    def update(self, group, step, parameters, gradients, *moments):
        (momentum,) = moments
        signs = torch._foreach_lerp(momentum, gradients, 1 - group["beta1"])
        torch._foreach_sign_(signs)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, signs, alpha=-group["lr"])
        torch._foreach_lerp_(momentum, gradients, 1 - group["beta2"])


class Adafactor(Listwise):
    """PaLM's: Adafactor (Shazeer and Stern 2018) without factors, which is Adam whose rate is
    relative to the root mean square of each parameter.

    Source: Chowdhery et al. 2022, section 5: momentum 0.9, beta2 = 1 - k^-0.8 at step k. What the
    paper leaves open is as in T5X: the momentum is of scaled updates, without bias correction.
    Updates are not clipped: the paper names only the clipping of the gradient.
    """

    slots = ("exp_avg", "exp_avg_sq")

    def update(self, group, step, parameters, gradients, *moments):
        momentum, second = moments
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_add_(squares, group["eps"])
        torch._foreach_lerp_(second, squares, step**-0.8)
        updates = torch._foreach_div(gradients, torch._foreach_sqrt(second))
        rms = torch._foreach_norm(parameters)
        torch._foreach_div_(rms, [p.numel() ** 0.5 for p in parameters])
        torch._foreach_mul_(updates, torch._foreach_clamp_min(rms, SCALE_FLOOR))
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_lerp_(momentum, updates, 1 - group["beta1"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, momentum)


QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024 that bring singular values near 1 in five steps."""
QUINTIC_STEPS = 5


class Muon(Listwise):
    """Nesterov momentum of matrices, orthogonalised (Jordan et al. 2024, kellerjordan.github.io).

    As torch.optim.Muon, which iterates in bfloat16 on every processor: about 20 times slower
    than float32 on one that only emulates bfloat16.
    """

    slots = ("momentum_buffer",)

    def __init__(self, params: Iterable[Any], lr: float, *, dtype: torch.dtype):
        super().__init__(params, lr, momentum=0.95)
        self.dtype = dtype
        """of the iteration"""

    def update(self, group, step, parameters, gradients, *moments):
        (buffers,) = moments
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for w, g, buffer in zip(parameters, gradients, buffers, strict=True):
            update = orthogonalised(g.lerp(buffer, momentum).to(self.dtype))
            rows, columns = w.shape
            w.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalised(x: Tensor) -> Tensor:
    """About U V^T of the matrix x = U S V^T, by a quintic Newton-Schulz iteration in x's dtype."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
