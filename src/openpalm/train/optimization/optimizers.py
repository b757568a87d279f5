"""AdamW, StableAdamW, Lion, PaLM's Adafactor and Muon, on whole tensors and on sharded ones.

Each is one `update` of whole lists of tensors, which a GPU runs as a few kernels. Weight decay is
decoupled: a step multiplies a parameter by 1 - lr * weight_decay.
"""

# pyright: reportPrivateImportUsage=false
# (torch's operations on lists have no public names; its own optimizers are made of them.)

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openpalm.train.optimization.listwise import Chunk, Listwise, Moments
from openpalm.train.optimization.orthogonalise import batches, orthogonalised, orthogonalised_parts

SCALE_FLOOR = 1e-3
"""Least root mean square of a parameter in Adafactor's step, so that zeros can change."""


class AdamW(Listwise):
    """AdamW by torch's fused kernel (Loshchilov and Hutter 2019, algorithm 2)."""

    slots = ("exp_avg", "exp_avg_sq")

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        first, second = moments
        group = chunk.group
        step = torch.tensor(float(chunk.step), device=chunk.parameters[0].device)
        torch._fused_adamw_(
            chunk.parameters,
            chunk.gradients,
            first,
            second,
            [],
            [step] * len(first),
            lr=group["lr"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class StableAdamW(Listwise):
    """AdamW with a smaller learning rate where gradients outgrow their second moment.

    Source: Wortsman et al. 2023 (arXiv 2304.13013), algorithm 2: betas debiased in place of the
    moments, and the rate of each tensor divided by max(1, RMS of g^2 / max(v, eps^2)).
    """

    slots = ("exp_avg", "exp_avg_sq")
    needs_norms = True

    def advance(self, chunk: Chunk, moments: Moments) -> list[Tensor]:
        (first, second), gradients = moments, chunk.gradients
        beta1, beta2 = (_debiased(chunk.group[name], chunk.step) for name in ("beta1", "beta2"))
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        roots = torch._foreach_clamp_min(torch._foreach_sqrt(second), chunk.group["eps"])
        return [*torch._foreach_norm(torch._foreach_div(gradients, roots))]

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        (first, second), group = moments, chunk.group
        rms = torch._foreach_div(norms, _root_sizes(chunk))
        rates = group["lr"] / torch.stack([*rms]).clamp_min(1)
        torch._foreach_mul_(chunk.parameters, (1 - rates * group["weight_decay"]).unbind())
        roots = torch._foreach_sqrt(second)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(roots, rates.unbind())
        torch._foreach_addcdiv_(chunk.parameters, first, roots, -1)


def _root_sizes(chunk: Chunk) -> list[float]:
    """Square roots of the sizes of the whole tensors: norm / root size = root mean square."""
    return [p.numel() ** 0.5 for p in chunk.owners]


def _debiased(beta: float, step: int) -> float:
    """beta (1 - beta^(t-1)) / (1 - beta^t): makes the moment a weighted mean from step 1 on."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


class Lion(Listwise):
    """Lion: the sign of a momentum, with more weight on the newest gradient (Chen et al. 2023).

    Source: arXiv 2302.06675, algorithm 2.
    """

    slots = ("exp_avg",)

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        (momentum,), group = moments, chunk.group
        signs = torch._foreach_lerp(momentum, chunk.gradients, 1 - group["beta1"])
        torch._foreach_sign_(signs)
        torch._foreach_mul_(chunk.parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(chunk.parameters, signs, alpha=-group["lr"])
        torch._foreach_lerp_(momentum, chunk.gradients, 1 - group["beta2"])


class Adafactor(Listwise):
    """PaLM's Adafactor: Adam with a step relative to each parameter's root mean square.

    It is Adafactor (Shazeer and Stern 2018) without factored moments.
    Source: Chowdhery et al. 2022, section 5: momentum 0.9, beta2 = 1 - k^-0.8 at step k. Details
    that the paper leaves open follow T5X: the momentum is of scaled updates, without bias
    correction. Updates are not clipped: the paper names only the clipping of the gradient.
    """

    slots = ("exp_avg", "exp_avg_sq")
    needs_norms = True

    def advance(self, chunk: Chunk, moments: Moments) -> list[Tensor]:
        return [*torch._foreach_norm(chunk.parameters)]

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        (momentum, second), group = moments, chunk.group
        squares = torch._foreach_mul(chunk.gradients, chunk.gradients)
        torch._foreach_add_(squares, group["eps"])
        torch._foreach_lerp_(second, squares, chunk.step**-0.8)
        updates = torch._foreach_div(chunk.gradients, torch._foreach_sqrt(second))
        rms = torch._foreach_div(norms, _root_sizes(chunk))
        torch._foreach_mul_(updates, torch._foreach_clamp_min(rms, SCALE_FLOOR))
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_lerp_(momentum, updates, 1 - group["beta1"])
        torch._foreach_mul_(chunk.parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(chunk.parameters, momentum)


class Muon(Listwise):
    """Muon: orthogonalised Nesterov momentum of matrices (Jordan et al. 2024).

    torch.optim.Muon always iterates in bfloat16, which is about 20 times slower than float32 on
    processors that only emulate bfloat16; here the caller chooses the dtype. A sharded matrix is
    orthogonalised whole, by one of its processes; torch's Muon does that to each part, which is
    another optimizer.
    Source: kellerjordan.github.io/posts/muon.
    """

    slots = ("momentum_buffer",)

    def __init__(
        self, params: Iterable[Any], lr: float, *, dtype: torch.dtype, offload: bool = False
    ):
        super().__init__(params, lr, momentum=0.95, offload=offload)
        self.dtype = dtype
        """dtype of the Newton-Schulz iteration"""

    def cut(self, parameters: list[Tensor]) -> list[list[Tensor]]:
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        return batches(sharded) + (super().cut(plain) if plain else [])

    def update(self, chunk: Chunk, moments: Moments, norms: list[Tensor]) -> None:
        (buffers,), group = moments, chunk.group
        torch._foreach_lerp_(buffers, chunk.gradients, 1 - group["momentum"])
        torch._foreach_mul_(chunk.parameters, 1 - group["lr"] * group["weight_decay"])
        pairs = zip(chunk.gradients, buffers, strict=True)
        # One at a time: on a device with plain tensors a chunk is every matrix of the model.
        updates = (g.lerp(buffer, group["momentum"]).to(self.dtype) for g, buffer in pairs)
        if isinstance(chunk.owners[0], DTensor):
            updates = orthogonalised_parts([*updates], chunk.owners)
        else:
            updates = (orthogonalised(update) for update in updates)
        for owner, part, update in zip(chunk.owners, chunk.parameters, updates, strict=True):
            rows, columns = owner.shape
            part.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))
