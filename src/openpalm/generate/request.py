"""A generation request, the tokens it yields, and its state while the engine works on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from openpalm.generate.adapters import Adapter
from openpalm.generate.sampling import Sampling

NO_TOKEN = -1
"""The id of a token that could not be chosen."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    """tokens that end the completion; the stop token is its last token"""
    top_log_probs: int = 0
    """number of likeliest tokens reported with every token"""
    score_prompt: bool = False
    """also yield the prompt's tokens, before the generated ones, with their log-probabilities"""
    score_from: int = 1
    """index of the first prompt token that `score_prompt` yields; the prefix that predicts none of
    them may be copied from another request's cache"""
    adapter: Adapter | None = None
    """LoRA adapter of this request, packed for the engine's model; None is the model itself"""


@dataclass(frozen=True)
class Token:
    """One generated token, or one scored token of a prompt."""

    request: int
    """index of its request in `generate`, or its ticket after `submit`"""
    id: int
    log_prob: float
    """natural log of the model's own probability, before temperature and filters"""
    finish: Literal["stop", "length", "error"] | None = None
    """why the completion ends here, or None; error: logits not finite, no token (id NO_TOKEN)"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens at this position and their log-probabilities, best first"""
    of_prompt: bool = False


class CachedTokens(NamedTuple):
    """Token ids with keys and values in the cache, and what computed them."""

    ids: list[int]
    adapter: int
    """serial number of the adapter; 0 without one"""

    def shared_length(self, wanted: "CachedTokens") -> int:
        """Tokens at the beginning that both have, computed with the same adapter."""
        if self.adapter != wanted.adapter:
            return 0
        return _common_prefix_length(self.ids, wanted.ids)


@dataclass(eq=False)
class ActiveRequest:
    """A request that waits or holds a slot of the cache."""

    ticket: int
    request: Request
    ids: list[int]
    """the prompt, then the generated tokens; the cache does not hold the last generated one yet"""
    generator: torch.Generator

    @property
    def generated(self) -> list[int]:
        return self.ids[len(self.request.ids) :]

    @property
    def reusable(self) -> CachedTokens:
        """The prefix that may be copied from another slot.

        Copied tokens yield no logits. Generation needs those of the last token, scoring those of
        the token before the first scored one and of all after it.
        """
        end = self.request.score_from - 1 if self.request.score_prompt else -1
        return CachedTokens(self.ids[:end], self.cached.adapter)

    @property
    def cached(self) -> CachedTokens:
        """What the cache holds of this request, or will hold."""
        adapter = self.request.adapter
        return CachedTokens(self.ids, 0 if adapter is None else adapter.serial)

    @property
    def prefill_length(self) -> int:
        """Tokens to compute before the first is generated; a score does not need the last one."""
        return len(self.ids) - (self.request.max_new_tokens == 0)

    @property
    def reserved_tokens(self) -> int:
        """The longest this request can become; reserved at admission, so nothing is evicted."""
        return len(self.request.ids) + self.request.max_new_tokens

    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Whether the last token of `ids` ends the completion."""
        if self.ids[-1] in self.request.stop_ids:
            return "stop"
        generated = len(self.ids) - len(self.request.ids)
        return "length" if generated >= self.request.max_new_tokens else None

    def error_token(self) -> Token:
        """Ends a request with logits that are not finite."""
        return Token(self.ticket, NO_TOKEN, math.nan, "error")


def tokens_with_log_probs(
    active: Sequence[ActiveRequest], ids: Sequence[int], logits: Tensor
) -> list[Token]:
    """One token for each request: ids[i] with its log-probability by logits[i], [rows, vocab]."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    log_probs = (logits.gather(-1, chosen) - normaliser).squeeze(-1).tolist()
    most = max(each.request.top_log_probs for each in active)
    top = [()] * len(active) if most == 0 else _top_log_probs(logits, normaliser, most)
    return [
        Token(each.ticket, token, log_prob, top=best[: each.request.top_log_probs])
        for each, token, log_prob, best in zip(active, ids, log_probs, top, strict=True)
    ]


def _top_log_probs(
    logits: Tensor, normaliser: Tensor, count: int
) -> list[tuple[tuple[int, float], ...]]:
    if count == 1:  # argmax, so that of tied logits the one is first that greedy sampling takes
        ids = logits.argmax(dim=-1, keepdim=True)
        values = logits.gather(-1, ids)
    else:
        values, ids = logits.topk(min(count, logits.shape[-1]))
    pairs = zip(ids.tolist(), (values - normaliser).tolist(), strict=True)
    return [tuple(zip(*pair, strict=True)) for pair in pairs]


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning of both; by bisection, because comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
