"""From logits to a token: how one is chosen, and pure functions that do it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpalm.base.permutation import mix64
from openpalm.errors import NumbersError, SettingsError

_SMALLEST_TEMPERATURE = 1e-30
"""Still above zero in float32; the difference to less cannot be seen."""
_LARGEST_CHANGE = 1e6
"""Of a logit: far more than any two logits differ by, and far from float32's limits."""
_SHORT_LIST = 256
"""Likeliest tokens that are looked at before all are put in order, which takes far longer."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """0 takes the most likely token"""
    top_k: int = 0
    """keep only this many of the likeliest tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the likeliest tokens that together have this probability"""
    seed: int = 0
    """of this request's random draws"""
    min_p: float = 0.0
    """keep tokens with at least this share of the likeliest one's probability"""
    presence_penalty: float = 0.0
    """taken once from the logit of every token generated before"""
    frequency_penalty: float = 0.0
    """taken from a token's logit for each time it was generated before"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token id -> what is added to its logit"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise SettingsError(f"--temperature {self.temperature}: must be in [0, 100]")
        if self.top_k < 0:
            raise SettingsError(f"--top-k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"--top-p {self.top_p}: must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise SettingsError(f"--min-p {self.min_p}: must be in [0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"--seed {self.seed}: must be a 64-bit whole number")
        changes = {"presence_penalty": self.presence_penalty}
        changes |= {"frequency_penalty": self.frequency_penalty}
        changes |= {f"logit_bias of token {i}": bias for i, bias in self.logit_bias.items()}
        for name, change in changes.items():
            if not (math.isfinite(change) and abs(change) <= _LARGEST_CHANGE):
                limits = f"-{_LARGEST_CHANGE:g} to {_LARGEST_CHANGE:g}"
                raise SettingsError(f"{name} ({change}) must be a number from {limits}")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before anything is chosen by them."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


def seed_of_answer(seed: int, index: int) -> int:
    """The seed of the answer `index` to one prompt: of the first `seed` itself, of the others a
    mixture, so that neighbouring seeds share no answer."""
    if index == 0:
        return seed
    value = mix64(mix64(seed) + index)
    return value - 2**64 if value >= 2**63 else value


def choose(
    logits: Tensor,
    hows: Sequence[Sampling],
    generated: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """A token for each row of logits [rows, vocab], each by its own settings and generator.

    `generated` are the tokens of each answer so far; only penalties look at them.
    """
    best = logits.argmax(dim=-1).tolist()
    drawn = [row for row, how in enumerate(hows) if how.temperature > 0 or how.adjusts]
    if drawn:  # on the CPU, where the generators are
        logits = logits.cpu()
    for row in drawn:
        how = hows[row]
        mine = adjusted(logits[row], how, generated[row])
        chances = distribution(
            mine,
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
        )
        best[row] = draw(chances, generators[row])
    return best


def adjusted(logits: Tensor, how: Sampling, generated: Sequence[int]) -> Tensor:
    """Logits [vocab] with bias and penalties, as the OpenAI API defines them:

    l_j + bias_j - count_j * frequency_penalty - [count_j > 0] * presence_penalty.
    """
    if not how.adjusts:
        return logits
    changes = dict(how.logit_bias)
    for token, count in Counter(generated).items():
        penalty = count * how.frequency_penalty + how.presence_penalty
        changes[token] = changes.get(token, 0.0) - penalty
    ids = torch.tensor(list(changes), dtype=torch.long)
    return logits.index_add(0, ids, torch.tensor(list(changes.values()), dtype=logits.dtype))


def distribution(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The probabilities a token is drawn from, [vocab] from logits [vocab].

    Temperature divides the logits; 0 puts everything on the best one. Then the `top_k` best are
    kept (0 keeps all), of those the ones with `min_p` of the best one's probability (Nguyen et al.
    2024), then the smallest set that holds `top_p` of what is left (Holtzman et al. 2020), always
    at least one.
    """
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # The best at zero, so that no small temperature makes it infinite.
    logits = (logits - logits.max()) / max(temperature, _SMALLEST_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        best = logits.topk(top_k)  # by index: equal logits at the edge are not all kept
        logits = torch.full_like(logits, -torch.inf).scatter_(0, best.indices, best.values)
    probabilities = logits.softmax(dim=-1)
    if min_p > 0:
        probabilities = torch.where(probabilities < min_p * probabilities.max(), 0, probabilities)
        probabilities /= probabilities.sum()
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    size = min(_SHORT_LIST, probabilities.shape[-1])
    ordered, order = probabilities.topk(size)
    if ordered.sum() < top_p:
        ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The best one always: the smallest top_p is zero in float32.
    kept = torch.where((before < top_p) | (before == 0), ordered, 0)
    return torch.zeros_like(probabilities).scatter_(0, order, kept / kept.sum())


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token id by its probability; the generator is the request's own.

    Inverts the cumulative sum: for a large vocabulary several times faster than multinomial.
    Raises NumbersError where the probabilities are not finite.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not cumulative[-1].isfinite():
        raise NumbersError("no token can be drawn: the probabilities are not finite numbers")
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))
