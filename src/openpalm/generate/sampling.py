"""From logits to a token: pure functions on a vector of logits."""

import torch
from torch import Tensor

_SMALLEST_TEMPERATURE = 1e-30
"""Still above zero in float32; the difference to less cannot be seen."""


def distribution(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The probabilities a token is drawn from, [vocab] from logits [vocab].

    Temperature divides the logits; 0 puts everything on the best one. Then the `top_k` best are
    kept (0 keeps all), then the smallest set that holds `top_p` of what is left (Holtzman et
    al. 2020), always at least one.
    """
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # The best at zero, so that no small temperature makes it infinite.
    logits = (logits - logits.max()) / max(temperature, _SMALLEST_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        best = logits.topk(top_k)  # by index: equal logits at the edge are not all kept
        logits = torch.full_like(logits, -torch.inf).scatter_(0, best.indices, best.values)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0)
    return torch.zeros_like(probabilities).scatter_(0, order, kept / kept.sum())


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token id by its probability; the generator is the request's own.

    Inverts the cumulative sum: for a large vocabulary several times faster than multinomial.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))
