"""The engine: requests in, tokens and log-probabilities out. Token ids only; text stays outside.

Sampling settings and seed travel with the request, and in float32 an answer does not depend on
which other requests share the batch.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from openpalm.errors import SettingsError
from openpalm.generate.pack import Weights, pack
from openpalm.generate.sampling import distribution, draw
from openpalm.model.cache import KVCache
from openpalm.model.transformer import Transformer

SHARED_AT_LEAST = 16
"""Tokens two prompts must begin with alike for the second to copy them."""
GROWTH = 256
"""The cache grows by multiples of this many tokens."""


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
    """index of its request, or its ticket where it was submitted"""
    id: int
    log_prob: float
    """natural log of the model's own probability, before temperature and filters"""
    finish: Literal["stop", "length"] | None = None
    """why the answer ends here, or None"""


@dataclass
class _Row:
    """A request in a slot of the cache."""

    ticket: int
    request: Request
    ids: list[int]
    """prompt, then what was generated; the last generated one is not in the cache yet"""
    generator: torch.Generator
    made: int = 0

    @property
    def reserve(self) -> int:
        """Tokens it may come to hold: reserved when it is admitted, so nothing is evicted."""
        return len(self.request.ids) + self.request.max_new_tokens


class Engine:
    """Generates from one model, at most `slots` sequences at a time, by continuous batching.

    A step admits waiting requests to free slots, reads one chunk of their prompts (at most
    `prefill_tokens`, so that a long prompt does not hold up the others' tokens), and decodes one
    token for every request that is read. Slots are kept in that order: [decoding | reading |
    what ended requests left, whose beginnings new prompts may share].

    `weights` says how its matrices are kept, see generate.pack; not given, as the model has them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 16,
        weights: Weights | None = None,
        prefill_tokens: int = 512,
    ):
        if not model.config.causal:
            raise SettingsError("a bidirectional model cannot generate text")
        self.slots = slots
        self.weights: Weights | None = weights
        self.prefill_tokens = prefill_tokens
        self.prefilled = 0
        """prompt tokens computed so far; shared beginnings are not computed again"""
        self._tickets = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._decoding = 0
        self._left: dict[int, list[int]] = {}
        self.refresh(model)

    def refresh(self, model: Transformer) -> None:
        """Takes the weights as they are now; later changes to `model` do not reach the engine."""
        if self.busy:
            raise AssertionError("the engine has requests in flight")
        in_bfloat16 = model.embedding.dtype == torch.bfloat16
        self.model = pack(model, self.weights or ("bfloat16" if in_bfloat16 else "float32"))
        table = self.model.embedding
        self._cache = KVCache(
            model.config, slots=self.slots, length=0, device=table.device, dtype=table.dtype
        )
        self._left.clear()

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or in a slot."""
        return bool(self._waiting or self._rows)

    def submit(self, request: Request) -> int:
        """Queues a request; its tokens carry the ticket returned. SettingsError for a bad id."""
        self._check(request.ids)
        ticket = next(self._tickets)
        if request.max_new_tokens > 0:
            generator = torch.Generator().manual_seed(request.sampling.seed)
            self._waiting.append(_Row(ticket, request, list(request.ids), generator))
        return ticket

    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Forgets a request, wherever it is; its slot is free at once."""
        self._waiting = deque(row for row in self._waiting if row.ticket != ticket)
        for slot, row in enumerate(self._rows):
            if row.ticket == ticket:
                self._release(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admits, reads one chunk of prompts, decodes one token each; returns the new tokens."""
        self._admit()
        tokens = self._decode() if self._decoding else []
        if len(self._rows) > self._decoding:
            tokens += self._read_chunk()
        return tokens

    def generate(self, requests: Sequence[Request]) -> Iterator[Token]:
        """Tokens as they come, those of one request in order. Raises SettingsError for a bad id.

        Left early, it cancels what is unfinished.
        """
        for request in requests:
            self._check(request.ids)
        if self.busy:
            raise AssertionError("the engine has requests in flight")
        index = {self.submit(request): position for position, request in enumerate(requests)}
        try:
            while self.busy:
                for token in self.step():
                    yield replace(token, request=index[token.request])
        finally:
            for ticket in index if self.busy else ():
                self.cancel(ticket)

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

    def _admit(self) -> None:
        """Fills free slots from the queue, with the longest beginning that is in the cache."""
        later: deque[_Row] = deque()
        while self._waiting and len(self._rows) < self.slots:
            row = self._waiting.popleft()
            if self._worth_waiting_for(row):
                later.append(row)
                continue
            source, shared = self._longest_beginning(row)
            slot = len(self._rows)
            needed = row.reserve + self.prefill_tokens
            self._cache.grow(-(-needed // GROWTH) * GROWTH)
            if shared and source != slot:
                self._cache.copy_slot(source, slot, shared)
            self._cache.lengths[slot] = shared
            self._left.pop(slot, None)
            self._rows.append(row)
        self._waiting.extendleft(reversed(later))

    def _longest_beginning(self, row: _Row) -> tuple[int, int]:
        """The slot that holds most of the prompt's beginning, and how many tokens of it.

        At least the prompt's last token is left to compute: its logits are wanted.
        """
        held = [(slot, other.ids) for slot, other in enumerate(self._rows)]
        best = (0, 0)
        for slot, ids in [*held, *self._left.items()]:
            most = min(self._cache.lengths[slot], len(row.ids) - 1)
            shared = _common(ids[:most], row.ids)
            if shared > best[1]:
                best = (slot, shared)
        return best if best[1] >= SHARED_AT_LEAST else (0, 0)

    def _worth_waiting_for(self, row: _Row) -> bool:
        """Whether a prompt being read now begins alike, further than what is in the cache."""
        being_read = (other.ids for other in self._rows[self._decoding :])
        soon = max((_common(ids, row.ids[:-1]) for ids in being_read), default=0)
        return soon >= self._longest_beginning(row)[1] + SHARED_AT_LEAST

    def _read_chunk(self) -> list[Token]:
        """Computes the next part of every unread prompt; those read to the end get a token."""
        first, last = self._decoding, len(self._rows)
        width = max(1, self.prefill_tokens // (last - first))
        cache = self._cache.span(first, last)
        parts = [
            row.ids[length : length + width]
            for row, length in zip(self._rows[first:], cache.lengths, strict=True)
        ]
        counts = [len(part) for part in parts]
        states = self.model.residual(self._padded(parts), cache, counts)
        self._cache.lengths[first:last] = cache.lengths
        self.prefilled += sum(counts)
        slots = range(first, last)
        read = [s for s in slots if self._cache.lengths[s] == len(self._rows[s].ids)]
        if not read:
            return []
        ends = torch.tensor([counts[slot - first] - 1 for slot in read])
        logits = self.model.head(states[torch.tensor(read) - first, ends]).cpu()
        for slot in read:  # ascending, so what moves away was read before
            self._swap(slot, self._decoding)
            self._decoding += 1
        return self._choose(range(first, self._decoding), logits)

    def _decode(self) -> list[Token]:
        """One more token for every request whose prompt is read."""
        count = self._decoding
        ids = torch.tensor([[row.ids[-1]] for row in self._rows[:count]])
        cache = self._cache.span(0, count)
        states = self.model.residual(ids.to(self._cache.keys.device), cache)[:, -1]
        self._cache.lengths[:count] = cache.lengths
        return self._choose(range(count), self.model.head(states).cpu())

    def _choose(self, slots: range, logits: Tensor) -> list[Token]:
        """A token for each of the slots; those that end are released."""
        tokens = []
        for slot, row_logits in zip(slots, logits, strict=True):
            row = self._rows[slot]
            row.made += 1
            tokens.append(_next(row, row_logits))
            row.ids.append(tokens[-1].id)
        for slot, token in reversed(list(zip(slots, tokens, strict=True))):
            if token.finish:
                self._release(slot)
        return tokens

    def _release(self, slot: int) -> None:
        """Frees a slot; what it held moves behind the slots in use and may be shared."""
        if slot < self._decoding:
            self._decoding -= 1
            self._swap(slot, self._decoding)
            slot = self._decoding
        last = len(self._rows) - 1
        self._swap(slot, last)
        self._left[last] = self._rows.pop().ids

    def _swap(self, a: int, b: int) -> None:
        self._cache.swap(a, b)
        self._rows[a], self._rows[b] = self._rows[b], self._rows[a]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _next(row: _Row, logits: Tensor) -> Token:
    request, how = row.request, row.request.sampling
    if how.temperature == 0:
        token = int(logits.argmax())
    else:
        chances = distribution(
            logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
        )
        token = draw(chances, row.generator)
    log_prob = float(logits[token] - logits.logsumexp(dim=-1))
    finish = "stop" if token in request.stop_ids else None
    if finish is None and row.made >= request.max_new_tokens:
        finish = "length"
    return Token(row.ticket, token, log_prob, finish)
