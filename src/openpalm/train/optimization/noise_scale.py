"""The gradient noise scale: the batch size above which a larger batch brings little.

Source: McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1. The squared norm of the gradient of
a batch of B tokens is on average g + s / B: g is that of the true gradient, s the variance that one
token brings. Norms at two batch sizes, a microbatch of all processes and the whole batch, give
unbiased estimates of both. B_simple = s / g, in the tokens (or pairs) that the objective counts.

mesh-transformer-jax logs the same with two biases: it squares the mean of the microbatches' norms,
which is less than the mean of their squares, and so underestimates s; and it takes norms of one
replica's microbatches but counts only the microbatches between the two batch sizes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openpalm.model.sharding import local_part
from openpalm.parallel.world import world
from openpalm.train.optimization.shards import local_gradient, squared_norm, with_part

DECAY = 0.99
"""Of the averages. One step's estimates are very noisy, and their ratio is biased."""


def estimates(
    squares: Sequence[float], counts: Sequence[float], whole_square: float
) -> tuple[float, float]:
    """g and s from the squared norms of mean gradients: of microbatches, and of them all."""
    # E |gradient of n|^2 = g + s / n: the mean over microbatches is as that of a batch of `small`.
    small = len(counts) / sum(1 / n for n in counts)
    large = sum(counts)
    mean = sum(squares) / len(squares)
    s = (mean - whole_square) / (1 / small - 1 / large)
    return whole_square - s / large, s


class NoiseScale:
    """Collects the gradients of a step's microbatches, and averages the estimates over steps.

    Needs memory for one more gradient. The gradient that it leaves is the usual sum, bit for bit.
    """

    def __init__(self, parameters: Sequence[Tensor], uncounted: Sequence[Tensor] = ()):
        self.parameters = parameters
        self.uncounted = uncounted
        self.g, self.s, self.weight = 0.0, 0.0, 0.0
        self._sum = dict[Tensor, Tensor]()
        self._squares = dict[int, float]()

    @torch.no_grad()
    def take(self, number: int, elsewhere: Mapping[Tensor, Tensor] | None = None) -> None:
        """Takes the gradient of microbatch `number` away from the parameters.

        A pipeline's process calls it once for each of its stages. elsewhere: for a parameter that
        another process has a copy of, this process's part of the gradient of that copy.
        """
        own = {parameter: parameter.grad for parameter in elsewhere or {}}
        for parameter, part in (elsewhere or {}).items():
            parameter.grad = with_part(parameter, local_gradient(parameter) + part)
        square = squared_norm(self.parameters, self.uncounted)
        self._squares[number] = self._squares.get(number, 0.0) + square
        for parameter, gradient in own.items():
            parameter.grad = gradient
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter in self._sum:
                local_part(self._sum[parameter]).add_(local_gradient(parameter))
            else:
                self._sum[parameter] = parameter.grad
            parameter.grad = None

    def give_back(self) -> None:
        """Gives the parameters the sum of the gradients."""
        for parameter, gradient in self._sum.items():
            parameter.grad = gradient
        self._sum = {}

    def _all_squares(self) -> list[float]:
        """Squared norms over all processes: one of each microbatch, and that of the sum."""
        own = [self._squares[number] for number in sorted(self._squares)]
        self._squares = {}
        return world().sums_over_all([*own, squared_norm(self.parameters, self.uncounted)])

    def metrics(self, counts: Sequence[float], loss_scale: float) -> dict[str, float]:
        """Ends a step: gives the gradients back, and returns the averages.

        counts: of each microbatch, over all processes. The loss of every microbatch was divided by
        their sum and multiplied by `loss_scale`. Without two microbatches that count something
        there is no estimate; noise/b_simple is left out while the average of g is not positive.
        """
        self.give_back()
        *squares, whole_square = self._all_squares()
        pairs = [(x, n) for x, n in zip(squares, counts, strict=True) if n]
        total = sum(counts)
        if len(pairs) > 1 and whole_square < float("inf"):  # false for NaN, too
            means = [x * (total / n / loss_scale) ** 2 for x, n in pairs]
            g, s = estimates(means, [n for _, n in pairs], whole_square / loss_scale**2)
            self.g = DECAY * self.g + (1 - DECAY) * g
            self.s = DECAY * self.s + (1 - DECAY) * s
            self.weight = DECAY * self.weight + (1 - DECAY)
        if not self.weight:
            return {}
        found = {"noise/g": self.g / self.weight, "noise/s": self.s / self.weight}
        return found | ({"noise/b_simple": self.s / self.g} if self.g > 0 else {})

    def state(self) -> dict[str, Any]:
        return {"g": self.g, "s": self.s, "weight": self.weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for values that `state` never gives."""
        g, s, weight = (float(state[name]) for name in ("g", "s", "weight"))
        if not 0 <= weight <= 1:
            raise ValueError(f"noise_scale is {state!r}")
        self.g, self.s, self.weight = g, s, weight
