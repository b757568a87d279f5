"""Sampling: temperature, top-k, top-p, min-p, penalties and logit bias, from logits to a token."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpalm.base.permutation import mix64
from openpalm.errors import NumbersError, SettingsError

_MIN_TEMPERATURE = 1e-30
"""Still above zero in float32; lower values sample the same token."""
_MAX_LOGIT_CHANGE = 1e6
"""Far more than the difference of any two logits, and far from float32's limits."""
_NUCLEUS_CANDIDATES = 256
"""Likeliest tokens tried for top-p before the whole vocabulary is sorted, which is far slower."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request. Raises SettingsError for a value out of range."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int = 0
    """keep only the k likeliest tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the smallest set of likeliest tokens with at least this total probability"""
    seed: int = 0
    """seed of this request's random numbers"""
    min_p: float = 0.0
    """keep tokens with at least this fraction of the likeliest token's probability"""
    presence_penalty: float = 0.0
    """subtracted once from the logit of every token generated before"""
    frequency_penalty: float = 0.0
    """subtracted from a token's logit for each time it was generated before"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token id -> number added to its logit"""

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
            if not (math.isfinite(change) and abs(change) <= _MAX_LOGIT_CHANGE):
                limits = f"-{_MAX_LOGIT_CHANGE:g} to {_MAX_LOGIT_CHANGE:g}"
                raise SettingsError(f"{name} ({change}) must be a number from {limits}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether a logit bias or a penalty changes the logits."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


def completion_seed(seed: int, index: int) -> int:
    """The seed of completion number `index` of one prompt.

    The first one uses `seed` itself. The others use a hash of seed and index, so that requests
    with neighbouring seeds have no completion in common.
    """
    if index == 0:
        return seed
    value = mix64(mix64(seed) + index)
    return value - 2**64 if value >= 2**63 else value  # torch takes signed 64-bit seeds


def choose_tokens(
    logits: Tensor,
    samplings: Sequence[Sampling],
    generated: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """A token for each row of logits [rows, vocab], by its own settings and generator.

    generated: the tokens of each completion so far; only penalties read them.
    """
    tokens = logits.argmax(dim=-1).tolist()
    sampled = [
        row for row, each in enumerate(samplings) if each.temperature > 0 or each.adjusts_logits
    ]
    if sampled:  # on the CPU, where the generators are
        logits = logits.cpu()
    for row in sampled:
        sampling = samplings[row]
        probabilities = distribution(
            adjusted(logits[row], sampling, generated[row]),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        tokens[row] = draw(probabilities, generators[row])
    return tokens


def adjusted(logits: Tensor, sampling: Sampling, generated: Sequence[int]) -> Tensor:
    """Logits [vocab] with logit bias and penalties, as the OpenAI API defines them:

    l_j + bias_j - count_j * frequency_penalty - [count_j > 0] * presence_penalty.
    """
    if not sampling.adjusts_logits:
        return logits
    changes = dict(sampling.logit_bias)
    for token, count in Counter(generated).items():
        penalty = count * sampling.frequency_penalty + sampling.presence_penalty
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
    """Probabilities [vocab] to draw a token from, given logits [vocab].

    Filters apply in this order: temperature (0 puts all probability on the likeliest token), top-k
    (0 keeps all), min-p (Nguyen et al. 2024), then top-p over the renormalised rest (Holtzman et
    al. 2020). At least one token is kept.
    """
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # The largest logit becomes zero, so that a small temperature cannot make it infinite.
    logits = (logits - logits.max()) / max(temperature, _MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        best = logits.topk(top_k)  # by index, because a threshold would keep all ties
        logits = torch.full_like(logits, -torch.inf).scatter_(0, best.indices, best.values)
    probabilities = logits.softmax(dim=-1)
    if min_p > 0:
        probabilities = torch.where(probabilities < min_p * probabilities.max(), 0, probabilities)
        probabilities /= probabilities.sum()
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens with probability `top_p`, renormalised."""
    size = min(_NUCLEUS_CANDIDATES, probabilities.shape[-1])
    ordered, order = probabilities.topk(size)
    if ordered.sum() < top_p:
        ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    # Always keeps the first token: the smallest top_p is zero in float32.
    kept = torch.where((before < top_p) | (before == 0), ordered, 0)
    return torch.zeros_like(probabilities).scatter_(0, order, kept / kept.sum())


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draws a token id from probabilities [vocab].

    Inverts the cumulative sum, which is several times faster than torch.multinomial for a large
    vocabulary. Raises NumbersError where the probabilities are not finite.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    if not cumulative[-1].isfinite():
        raise NumbersError("no token can be drawn: the probabilities are not finite numbers")
    point = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))
