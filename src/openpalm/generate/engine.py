"""The engine: requests in, tokens and log-probabilities out. Token ids only; text stays outside.

Sampling settings and seed travel with the request, and in float32 an answer does not depend on
which other requests share the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from openpalm.errors import SettingsError
from openpalm.generate.pack import Weights, pack
from openpalm.generate.sampling import distribution, draw
from openpalm.model.cache import KVCache
from openpalm.model.transformer import Transformer


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

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise SettingsError(f"--temperature {self.temperature}: must be in [0, 100]")
        if self.top_k < 0:
            raise SettingsError(f"--top-k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"--top-p {self.top_p}: must be in (0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"--seed {self.seed}: must be a 64-bit whole number")


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    """tokens that end the answer; the one that did is its last token"""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    request: int
    """index of its request"""
    id: int
    log_prob: float
    """natural log of the model's own probability, before temperature and filters"""
    finish: Literal["stop", "length"] | None = None
    """why the answer ends here, or None"""


class Engine:
    """Generates from one model, `slots` sequences at a time.

    `weights` says how its matrices are kept, see generate.pack; not given, as the model has them.
    """

    def __init__(self, model: Transformer, *, slots: int = 16, weights: Weights | None = None):
        if not model.config.causal:
            raise SettingsError("a bidirectional model cannot generate text")
        self.slots = slots
        self.weights: Weights | None = weights
        self.refresh(model)

    def refresh(self, model: Transformer) -> None:
        """Takes the weights as they are now; later changes to `model` do not reach the engine."""
        in_bfloat16 = model.embedding.dtype == torch.bfloat16
        self.model = pack(model, self.weights or ("bfloat16" if in_bfloat16 else "float32"))

    def generate(self, requests: Sequence[Request]) -> Iterator[Token]:
        """Tokens as they come, those of one request in order. Raises SettingsError for a bad id."""
        for request in requests:
            self._check(request.ids)
        for start in range(0, len(requests), self.slots):
            group = range(start, min(start + self.slots, len(requests)))
            yield from self._decode({index: requests[index] for index in group})

    def answers(self, requests: Sequence[Request]) -> list[list[int]]:
        """The generated ids of every request, in the order of the requests."""
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.generate(requests):
            answers[token.request].append(token.id)
        return answers

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probability of each token after the first, given those before: [len - 1] each.

        Raises SettingsError for an empty sequence or a bad id.
        """
        for sequence in sequences:
            self._check(sequence)
        scores = []
        for start in range(0, len(sequences), self.slots):
            group = sequences[start : start + self.slots]
            ids = self._padded(group)
            log_probs = self.model.logits(ids).log_softmax(dim=-1)[:, :-1]
            picked = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
            scores += [
                row[: len(sequence) - 1] for row, sequence in zip(picked, group, strict=True)
            ]
        return scores

    def _check(self, ids: Sequence[int]) -> None:
        vocab = self.model.config.vocab_size
        if not ids:
            raise SettingsError("the prompt is empty; give at least one token")
        worst = max(ids, key=lambda i: i if i >= 0 else vocab - i)
        if not 0 <= worst < vocab:
            raise SettingsError(
                f"token id {worst}: the model's vocabulary has {vocab}; use the model's tokenizer"
            )

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, sequences))
        rows = [[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences]
        return torch.tensor(rows, device=self.model.embedding.device)

    @torch.inference_mode()
    def _decode(self, requests: dict[int, Request]) -> Iterator[Token]:
        """One prefill of ragged prompts, then a token for every unfinished request a step."""
        active = [index for index, request in requests.items() if request.max_new_tokens > 0]
        if not active:
            return
        generators = {i: torch.Generator().manual_seed(requests[i].sampling.seed) for i in active}
        made = dict.fromkeys(active, 0)
        cache = self._cache([requests[index] for index in active])
        prompts = [requests[index].ids for index in active]
        counts = [len(prompt) for prompt in prompts]
        states = self.model.residual(self._padded(prompts), cache, counts)
        states = states[torch.arange(len(active)), torch.tensor(counts) - 1]
        while True:
            logits = self.model.head(states).cpu()
            tokens = []
            for row, index in enumerate(active):
                request = requests[index]
                made[index] += 1
                tokens.append(_next(index, logits[row], request, generators[index], made[index]))
            yield from tokens
            alive = [row for row, token in enumerate(tokens) if token.finish is None]
            if not alive:
                return
            if len(alive) < len(active):
                cache.keep(alive)
                active = [active[row] for row in alive]
            ids = torch.tensor([[tokens[row].id] for row in alive], device=states.device)
            states = self.model.residual(ids, cache)[:, -1]

    def _cache(self, requests: list[Request]) -> KVCache:
        longest = max(len(request.ids) for request in requests)
        room = longest + max(request.max_new_tokens for request in requests)
        table = self.model.embedding
        return KVCache(
            self.model.config,
            slots=len(requests),
            length=room,
            device=table.device,
            dtype=table.dtype,
        )


def _next(
    index: int, logits: Tensor, request: Request, generator: torch.Generator, made: int
) -> Token:
    how = request.sampling
    chances = distribution(logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
    token = draw(chances, generator)
    log_prob = float(logits[token] - logits.logsumexp(dim=-1))
    finish = "stop" if token in request.stop_ids else None
    if finish is None and made >= request.max_new_tokens:
        finish = "length"
    return Token(index, token, log_prob, finish)
