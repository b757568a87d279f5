"""Optimizers that torch does not have: StableAdamW, Lion, PaLM's Adafactor, Muon in any dtype.

Each is one `update` of whole lists of tensors, which a GPU runs as a few kernels. The state of a
parameter is named tensors: its moments and the number of its steps. Weight decay is decoupled: a
step multiplies a parameter by 1 - lr * weight_decay.
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
"""Least root mean square of a parameter in Adafactor's step, so that zeros can change."""


class Listwise(torch.optim.Optimizer):
    """An optimizer that updates all parameters with equal step counts in one call."""

    slots: ClassVar[tuple[str, ...]]
    """names of the moments; each has its parameter's shape"""

    def __init__(self, params: Iterable[Any], lr: float, **defaults: Any):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0} | defaults)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for step, parameters in self._of_equal_age(group["params"]).items():
                # A CPU's cache holds one tensor and its moments, not all of them.
                on_cpu = parameters[0].device.type == "cpu"
                for some in [[p] for p in parameters] if on_cpu else [parameters]:
                    gradients = [p.grad for p in some if p.grad is not None]
                    moments = [[self.state[p][slot] for p in some] for slot in self.slots]
                    self.update(group, step, some, gradients, *moments)

    def _of_equal_age(self, parameters: list[Tensor]) -> dict[int, list[Tensor]]:
        """The parameters with a gradient, by the number (from 1) of their next step."""
        ages = defaultdict[int, list[Tensor]](list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)  # on the CPU: read each step
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
    """AdamW with a smaller learning rate where gradients outgrow their second moment.

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
    """beta (1 - beta^(t-1)) / (1 - beta^t): makes the moment a weighted mean from step 1 on."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


class Lion(Listwise):
    """Lion: the sign of a momentum, with more weight on the newest gradient (Chen et al. 2023).

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
    """PaLM's Adafactor: Adam with a step relative to each parameter's root mean square.

    It is Adafactor (Shazeer and Stern 2018) without factored moments.
    Source: Chowdhery et al. 2022, section 5: momentum 0.9, beta2 = 1 - k^-0.8 at step k. Details
    that the paper leaves open follow T5X: the momentum is of scaled updates, without bias
    correction. Updates are not clipped: the paper names only the clipping of the gradient.
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
    """Muon: orthogonalised Nesterov momentum of matrices (Jordan et al. 2024).

    torch.optim.Muon always iterates in bfloat16, which is about 20 times slower than float32 on
    processors that only emulate bfloat16; here the caller chooses the dtype.
    Source: kellerjordan.github.io/posts/muon.
    """

    slots = ("momentum_buffer",)

    def __init__(self, params: Iterable[Any], lr: float, *, dtype: torch.dtype):
        super().__init__(params, lr, momentum=0.95)
        self.dtype = dtype
        """dtype of the Newton-Schulz iteration"""

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
    """Approximates U V^T of the matrix x = U S V^T by a quintic Newton-Schulz iteration."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
