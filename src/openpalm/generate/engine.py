"""The engine: requests in, tokens and log-probabilities out. Token ids only; text stays outside.

Sampling settings and seed travel with the request, and in float32 an answer does not depend on
which other requests share the batch.
"""

import copy
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from openpalm.errors import NumbersError, SettingsError
from openpalm.generate.quantize import WeightFormat, quantize
from openpalm.generate.sampling import Sampling, choose
from openpalm.model.block import Block
from openpalm.model.cache import KVCache
from openpalm.model.transformer import Transformer

SHARED_AT_LEAST = 16
"""Tokens two prompts must begin with alike for the second to copy them."""
GROWTH = 256
"""The cache grows by multiples of this many tokens."""
NO_TOKEN = -1
"""The id of a token that could not be chosen."""
NOT_FINITE = (
    "the model computed numbers that are not finite: its weights are damaged, or too large for its "
    "dtype; use another checkpoint, or --dtype float32"
)


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    """tokens that end the answer; the one that did is its last token"""
    top_log_probs: int = 0
    """how many of the likeliest tokens come with every token"""
    score_prompt: bool = False
    """the prompt's own tokens after the first come first, with their log-probabilities"""


@dataclass(frozen=True)
class Token:
    """One generated token, or one of a prompt that is scored."""

    request: int
    """index of its request, or its ticket where it was submitted"""
    id: int
    log_prob: float
    """natural log of the model's own probability, before temperature and filters"""
    finish: Literal["stop", "length", "error"] | None = None
    """why the answer ends here, or None; error: logits not finite, no token (id NO_TOKEN)"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest tokens in its place and their log-probabilities, best first"""
    of_prompt: bool = False


@dataclass(eq=False)
class _Row:
    """A request in a slot of the cache."""

    ticket: int
    request: Request
    ids: list[int]
    """prompt, then what was generated; the last generated one is not in the cache yet"""
    generator: torch.Generator

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - len(self.request.ids)

    @property
    def generated(self) -> list[int]:
        return self.ids[len(self.request.ids) :]

    @property
    def copyable(self) -> list[int]:
        """What it may copy: logits of its last token, or when scored of all, are wanted."""
        return [] if self.request.score_prompt else self.ids[:-1]

    @property
    def to_read(self) -> int:
        """Tokens to compute before the first is generated; a score needs nothing of the last."""
        return len(self.ids) - (self.request.max_new_tokens == 0)

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
    `owned` says that nobody changes the model while the engine uses it: nothing is copied that
    packing does not copy.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 16,
        weights: WeightFormat | None = None,
        prefill_tokens: int = 512,
        owned: bool = False,
    ):
        if not model.config.causal:
            raise SettingsError("a bidirectional model cannot generate text")
        self.slots = slots
        self.weights: WeightFormat | None = weights
        self.prefill_tokens = prefill_tokens
        self.prefilled_tokens = 0
        """prompt tokens computed so far; shared beginnings are not computed again"""
        self._tickets = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        self._decoding = 0
        self._left: dict[int, list[int]] = {}
        self.refresh(model, owned=owned)

    def refresh(self, model: Transformer, *, owned: bool = False) -> None:
        """Takes the weights as they are now; later changes to `model` do not reach the engine.

        Unless it is `owned`, see above.
        """
        if self.busy:
            raise AssertionError("the engine has requests in flight")
        model = model if owned else _apart(model)
        in_bfloat16 = model.embedding.dtype == torch.bfloat16
        self.model = quantize(model, self.weights or ("bfloat16" if in_bfloat16 else "float32"))
        table = self.model.embedding
        self._cache = KVCache(
            model.config, slots=self.slots, length=0, device=table.device, dtype=table.dtype
        )
        self._left.clear()

    def reset(self) -> None:
        """Forgets every request and all that was read: a new start after a step that raised."""
        self._waiting.clear()
        self._rows.clear()
        self._left.clear()
        self._decoding = 0
        self._cache.lengths = [0] * self.slots

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or in a slot."""
        return bool(self._waiting or self._rows)

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._rows)

    def submit(self, request: Request) -> int:
        """Queues a request; its tokens carry the ticket returned. SettingsError for a bad id."""
        self.check(request.ids)
        ticket = next(self._tickets)
        if request.max_new_tokens > 0 or (request.score_prompt and len(request.ids) > 1):
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
        """Tokens as they come, those of one request in order.

        Raises SettingsError for a bad id, and NumbersError where logits are not finite. Left
        early, it cancels what is unfinished.
        """
        for request in requests:
            self.check(request.ids)
        if self.busy:
            raise AssertionError("the engine has requests in flight")
        index = {self.submit(request): position for position, request in enumerate(requests)}
        try:
            while self.busy:
                for token in self.step():
                    if token.finish == "error":
                        raise NumbersError(NOT_FINITE)
                    yield replace(token, request=index[token.request])
        finally:
            for ticket in index if self.busy else ():
                self.cancel(ticket)

    def completions(self, requests: Sequence[Request]) -> list[list[int]]:
        """The generated ids of every request, in the order of the requests.

        Raises what `generate` raises.
        """
        answers: list[list[int]] = [[] for _ in requests]
        for token in self.generate(requests):
            if not token.of_prompt:
                answers[token.request].append(token.id)
        return answers

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probability of each token after the first, given those before: [len - 1] each.

        Raises SettingsError for an empty sequence or a bad id, NumbersError as `generate`.
        """
        scores: list[list[float]] = [[] for _ in sequences]
        requests = [Request(sequence, 0, score_prompt=True) for sequence in sequences]
        for token in self.generate(requests):
            scores[token.request].append(token.log_prob)
        return [torch.tensor(row) for row in scores]

    def check(self, ids: Sequence[int]) -> None:
        """Raises SettingsError for no ids, or one outside of the vocabulary."""
        vocab = self.model.config.vocab_size
        if not ids:
            raise SettingsError("the prompt is empty; give at least one token")
        worst = max(ids, key=lambda i: i if i >= 0 else vocab - i)
        if not 0 <= worst < vocab:
            raise SettingsError(
                f"token id {worst}: the model's vocabulary has {vocab}; use the model's tokenizer"
            )

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        # By a row's own last token: what a row computes, finite or not, is its own doing.
        longest = max(map(len, sequences))
        rows = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences]
        return torch.tensor(rows, device=self.model.embedding.device)

    def _admit(self) -> None:
        """Fills free slots from the queue, with the longest beginning that is in the cache."""
        later: deque[_Row] = deque()
        while self._waiting and len(self._rows) < self.slots:
            row = self._waiting.popleft()
            source, shared = self._longest_beginning(row)
            if self._soon_readable(row) >= shared + SHARED_AT_LEAST:
                later.append(row)
                continue
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
        """The slot that holds most of the prompt's beginning, and how many tokens of it."""
        wanted = row.copyable
        if len(wanted) < SHARED_AT_LEAST:
            return (0, 0)
        held = [(slot, other.ids) for slot, other in enumerate(self._rows)]
        best = (0, 0)
        for slot, ids in [*held, *self._left.items()]:
            shared = _common(ids[: self._cache.lengths[slot]], wanted)
            if shared > best[1]:
                best = (slot, shared)
        return best if best[1] >= SHARED_AT_LEAST else (0, 0)

    def _soon_readable(self, row: _Row) -> int:
        """Tokens of its beginning that prompts being read now have in common with it."""
        wanted = row.copyable
        if len(wanted) < SHARED_AT_LEAST:
            return 0
        being_read = (other.ids for other in self._rows[self._decoding :])
        return max((_common(ids, wanted) for ids in being_read), default=0)

    def _read_chunk(self) -> list[Token]:
        """Computes the next part of every unread prompt; those read to the end get a token."""
        first, last = self._decoding, len(self._rows)
        width = max(1, self.prefill_tokens // (last - first))
        cache = self._cache.span(first, last)
        parts = [
            row.ids[length : min(length + width, row.to_read)]
            for row, length in zip(self._rows[first:], cache.lengths, strict=True)
        ]
        counts = [len(part) for part in parts]
        states = self.model.residual(self._padded(parts), cache, counts)
        self._cache.lengths[first:last] = cache.lengths
        self.prefilled_tokens += sum(counts)
        rows = list(zip(self._rows[first:], cache.lengths, counts, states, strict=True))
        tokens = [t for row, end, count, part in rows for t in self._scored(row, end, part[:count])]
        failed = {token.request for token in tokens if token.finish == "error"}
        read = [
            i
            for i, (row, end, _, _) in enumerate(rows)
            if end == row.to_read and row.ticket not in failed
        ]
        scored_only = [rows[i][0] for i in read if rows[i][0].request.max_new_tokens == 0]
        read = [i for i in read if rows[i][0].request.max_new_tokens > 0]
        if read:
            ends = torch.tensor([counts[i] - 1 for i in read])
            logits = self.model.head(states[torch.tensor(read), ends])
            for i in read:  # ascending, so what moves away was read before
                self._swap(first + i, self._decoding)
                self._decoding += 1
            tokens += self._chosen(range(first, self._decoding), logits)
        for row in scored_only:
            self._release(self._rows.index(row))
        # After `_chosen`, which released those whose logits failed.
        for row in [row for row in self._rows if row.ticket in failed]:
            self._discard(self._rows.index(row))
        return tokens

    def _scored(self, row: _Row, end: int, states: Tensor) -> list[Token]:
        """The prompt's tokens that follow the states [time, dim] of its positions before `end`.

        Where a number is not finite, the error token alone.
        """
        request = row.request
        if not states.sum(dtype=torch.float32).isfinite():
            return [_failed(row)]
        following = request.ids[end - len(states) + 1 : end + 1]
        if not request.score_prompt or not following:
            return []
        logits = self.model.head(states[: len(following)])
        if not _finite(logits).all():
            return [_failed(row)]
        tokens = [
            replace(token, of_prompt=True)
            for token in _tokens([row] * len(following), following, logits)
        ]
        if request.max_new_tokens == 0 and end == row.to_read:
            tokens[-1] = replace(tokens[-1], finish="length")
        return tokens

    def _decode(self) -> list[Token]:
        """One more token for every request whose prompt is read."""
        count = self._decoding
        ids = torch.tensor([[row.ids[-1]] for row in self._rows[:count]])
        cache = self._cache.span(0, count)
        states = self.model.residual(ids.to(self._cache.keys.device), cache)[:, -1]
        self._cache.lengths[:count] = cache.lengths
        return self._chosen(range(count), self.model.head(states))

    def _chosen(self, slots: range, logits: Tensor) -> list[Token]:
        """A token for each of the slots; those that end are released."""
        rows = [self._rows[slot] for slot in slots]
        finite = _finite(logits)
        # A row that failed is chosen for like the others, from zeros, and then says so.
        logits = logits if finite.all() else logits.where(finite[:, None], 0.0)
        hows = [row.request.sampling for row in rows]
        generated = [row.generated if row.request.sampling.adjusts else () for row in rows]
        ids = choose(logits, hows, generated, [row.generator for row in rows])
        for row, token in zip(rows, ids, strict=True):
            row.ids.append(token)
        ends = [_finish(row) for row in rows]
        tokens = [
            token if end is None else replace(token, finish=end)
            for token, end in zip(_tokens(rows, ids, logits), ends, strict=True)
        ]
        for i in (~finite).nonzero().flatten().tolist():
            tokens[i] = _failed(rows[i])
        for slot, token in reversed(list(zip(slots, tokens, strict=True))):
            if token.finish == "error":
                self._discard(slot)
            elif token.finish:
                self._release(slot)
        return tokens

    def _discard(self, slot: int) -> None:
        """Frees the slot of a request whose numbers are not finite; none of them is kept.

        A masked key counts zero times its value, and zero times nan is nan. Requests that go on
        hold finite numbers alone, so whatever else is found in the cache is of this one.
        """
        self._release(slot)
        self._left.pop(len(self._rows))
        for kept in (self._cache.keys, self._cache.values):
            kept.nan_to_num_(0.0, 0.0, 0.0)

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


def _apart(model: Transformer) -> Transformer:
    """The model with its own copy of all that packing does not copy: tables, norms and biases.

    The blocks' matrices, and what only training needs (a critic), are shared with `model`.
    """
    used = {id(parameter) for _, parameter in model.published_parameters()}
    shared = [parameter for parameter in model.parameters() if id(parameter) not in used]
    for block in model.blocks:
        assert isinstance(block, Block)
        for projection in (block.project_in, block.project_out):
            shared += [p for p in projection.parameters(recurse=False) if p.dim() == 2]
    return copy.deepcopy(model, {id(parameter): parameter for parameter in shared})


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike: halving, since slices are compared at once."""
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


def _finite(logits: Tensor) -> Tensor:
    """Whether all of each row [rows, vocab] are finite: by their sum, the fastest way to see it."""
    return logits.sum(dim=-1, dtype=torch.float64).isfinite()


def _failed(row: _Row) -> Token:
    return Token(row.ticket, NO_TOKEN, math.nan, "error")


def _tokens(rows: Sequence[_Row], ids: Sequence[int], logits: Tensor) -> list[Token]:
    """What each row says with its id, chosen by its row of logits [rows, vocab]."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    log_probs = (logits.gather(-1, chosen) - normaliser).squeeze(-1).tolist()
    most = max(row.request.top_log_probs for row in rows)
    top = [()] * len(rows) if most == 0 else _likeliest(logits, normaliser, most)
    return [
        Token(row.ticket, token, log_prob, top=best[: row.request.top_log_probs])
        for row, token, log_prob, best in zip(rows, ids, log_probs, top, strict=True)
    ]


def _likeliest(
    logits: Tensor, normaliser: Tensor, count: int
) -> list[tuple[tuple[int, float], ...]]:
    values, ids = logits.topk(min(count, logits.shape[-1]))
    pairs = zip(ids.tolist(), (values - normaliser).tolist(), strict=True)
    return [tuple(zip(*pair, strict=True)) for pair in pairs]


def _finish(row: _Row) -> Literal["stop", "length"] | None:
    if row.ids[-1] in row.request.stop_ids:
        return "stop"
    return "length" if row.made >= row.request.max_new_tokens else None
