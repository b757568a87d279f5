"""The inference engine: continuous batching, chunked prefill and prefix sharing over one KV cache.

Takes token ids, returns tokens and log-probabilities; knows no text. Sampling settings and the
seed are part of the request. In float32 a completion does not depend on the other requests in
the batch.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openpalm.errors import NumbersError, SettingsError
from openpalm.generate.adapters import Routing, routed
from openpalm.generate.quantize import WeightFormat, copy_unquantized_parts, quantize
from openpalm.generate.request import (
    ActiveRequest,
    CachedTokens,
    Request,
    Token,
    tokens_with_log_probs,
)
from openpalm.generate.sampling import choose_tokens
from openpalm.model.cache import KVCache
from openpalm.model.transformer import Transformer

MIN_SHARED_PREFIX = 16
"""Tokens; a shorter common prefix is computed again, not copied."""
CACHE_GROWTH = 256
"""The cache grows in multiples of this many tokens, so that it is seldom copied."""
NOT_FINITE = (
    "the model computed numbers that are not finite: its weights are damaged, or too large for its "
    "dtype; use another checkpoint, or --dtype float32"
)


class Engine:
    """Generates from one model, at most `slots` sequences at a time, by continuous batching.

    A step admits waiting requests to free slots, decodes one token for every request with a
    complete prefill, and prefills one chunk of the other prompts. A chunk has at most
    `prefill_tokens` tokens, so that a long prompt does not delay the tokens of other requests.

    Slots are kept in this order, so that each group is one slice of the cache:
    [decoding | prefilling | free]. Free slots keep the tokens of finished requests, and new
    prompts copy shared prefixes from there.

    weights: format of the matrices, see `quantize`; None keeps the model's dtype.
    owned: nobody changes the model while the engine uses it, so its parameters are not copied.
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
        """prompt tokens computed so far; tokens of a copied prefix do not count"""
        self._tickets = itertools.count()
        self._waiting: deque[ActiveRequest] = deque()
        self._active: list[ActiveRequest] = []
        """the request in each slot in use; slot i holds the keys and values of _active[i]"""
        self._decoding = 0
        """slots 0 .. _decoding - 1 decode, the other active ones prefill"""
        self._finished: dict[int, CachedTokens] = {}
        """what free slots still hold, by slot"""
        self.refresh(model, owned=owned)

    def refresh(self, model: Transformer, *, owned: bool = False) -> None:
        """Takes the current weights of `model` and empties the cache.

        Later changes to `model` do not reach the engine, unless it is `owned`.
        """
        if self.busy:
            raise AssertionError("the engine has requests in flight")
        model = model if owned else copy_unquantized_parts(model)
        in_bfloat16 = model.embedding.dtype == torch.bfloat16
        quantized = quantize(model, self.weights or ("bfloat16" if in_bfloat16 else "float32"))
        self._routing = Routing()
        self.model = routed(quantized, self._routing)
        table = self.model.embedding
        self._cache = KVCache(
            model.config, slots=self.slots, length=0, device=table.device, dtype=table.dtype
        )
        self._finished.clear()  # keys and values of the old weights

    def reset(self) -> None:
        """Drops every request and empties the cache; for use after a step that raised."""
        self._waiting.clear()
        self._active.clear()
        self._finished.clear()
        self._decoding = 0
        self._cache.lengths = [0] * self.slots

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or in a slot."""
        return bool(self._waiting or self._active)

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._active)

    def submit(self, request: Request) -> int:
        """Queues a request and returns the ticket that its tokens carry.

        Raises SettingsError for a bad token id.
        """
        self.check(request.ids)
        if request.adapter is not None and request.adapter.model != self.model.config:
            raise AssertionError("the adapter is packed for another model")
        ticket = next(self._tickets)
        scored = request.score_prompt and len(request.ids) > request.score_from
        if request.max_new_tokens > 0 or scored:
            # A generator per request: its completion does not depend on what else is in the batch.
            generator = torch.Generator().manual_seed(request.sampling.seed)
            self._waiting.append(ActiveRequest(ticket, request, list(request.ids), generator))
        return ticket

    # The cache grew in inference mode, and torch changes such tensors in that mode only.
    @torch.inference_mode()
    def cancel(self, ticket: int) -> None:
        """Drops a request, waiting or active; its slot is free at once."""
        self._waiting = deque(each for each in self._waiting if each.ticket != ticket)
        for slot, each in enumerate(self._active):
            if each.ticket == ticket:
                self._release(slot)
                return

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admits requests, decodes one token each, prefills one chunk; returns the new tokens."""
        # Decoding before prefill: running requests never wait for a long prompt.
        self._admit()
        tokens = self._decode() if self._decoding else []
        if len(self._active) > self._decoding:
            tokens += self._prefill_chunk()
        return tokens

    def generate(self, requests: Sequence[Request]) -> Iterator[Token]:
        """Yields tokens as they are computed; the tokens of one request come in order.

        Raises SettingsError for a bad id, and NumbersError where logits are not finite. Closing
        the iterator early cancels the unfinished requests.
        """
        # All prompts before the first submit: a bad one must not leave others in the queue.
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

        Raises the errors of `generate`.
        """
        completions: list[list[int]] = [[] for _ in requests]
        for token in self.generate(requests):
            if not token.of_prompt:
                completions[token.request].append(token.id)
        return completions

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probability of each token after the first, given those before: [len - 1] each.

        Raises SettingsError for an empty sequence or a bad id, NumbersError as `generate`.
        """
        scores: list[list[float]] = [[] for _ in sequences]
        requests = [Request(sequence, 0, score_prompt=True) for sequence in sequences]
        for token in self.generate(requests):
            scores[token.request].append(token.log_prob)
        return [torch.tensor(log_probs) for log_probs in scores]

    def check(self, ids: Sequence[int]) -> None:
        """Raises SettingsError for an empty prompt or a token id outside the vocabulary."""
        vocab = self.model.config.vocab_size
        if not ids:
            raise SettingsError("the prompt is empty; give at least one token")
        # A negative id ranks above every valid one, so one pass finds either kind of bad id.
        worst = max(ids, key=lambda i: i if i >= 0 else vocab - i)
        if not 0 <= worst < vocab:
            raise SettingsError(
                f"token id {worst}: the model's vocabulary has {vocab}; use the model's tokenizer"
            )

    def _admit(self) -> None:
        """Moves waiting requests into free slots and copies the longest cached prefix of each."""
        postponed: deque[ActiveRequest] = deque()
        while self._waiting and len(self._active) < self.slots:
            new = self._waiting.popleft()
            source, shared = self._longest_cached_prefix(new)
            # A prompt in prefill will soon hold a longer prefix: waiting is cheaper than computing
            # it twice. Samples of one prompt are the common case.
            if self._prefix_in_prefill(new) >= shared + MIN_SHARED_PREFIX:
                postponed.append(new)
                continue
            slot = len(self._active)
            # A chunk is written at its padded width, so there must be room for one beyond the end.
            needed = new.reserved_tokens + self.prefill_tokens
            self._cache.grow(-(-needed // CACHE_GROWTH) * CACHE_GROWTH)
            # A prefix that this free slot holds itself is used where it is.
            if shared and source != slot:
                self._cache.copy_slot(source, slot, shared)
            self._cache.lengths[slot] = shared
            # The slot's old tokens will be overwritten, so no later prompt may copy them.
            self._finished.pop(slot, None)
            self._active.append(new)
        # Back to the front in their old order, or later requests would overtake them.
        self._waiting.extendleft(reversed(postponed))

    def _longest_cached_prefix(self, new: ActiveRequest) -> tuple[int, int]:
        """The slot that holds the longest prefix of the prompt, and its length in tokens."""
        wanted = new.reusable
        if len(wanted.ids) < MIN_SHARED_PREFIX:
            return (0, 0)
        held = [(slot, each.cached) for slot, each in enumerate(self._active)]
        best = (0, 0)
        for slot, cached in [*held, *self._finished.items()]:
            # Only what the cache holds: a prompt in prefill, or a newest token, is not all there.
            shared = min(cached.shared_length(wanted), self._cache.lengths[slot])
            if shared > best[1]:
                best = (slot, shared)
        return best if best[1] >= MIN_SHARED_PREFIX else (0, 0)

    def _prefix_in_prefill(self, new: ActiveRequest) -> int:
        """Tokens of the longest prefix that the prompt has in common with one in prefill."""
        wanted = new.reusable
        if len(wanted.ids) < MIN_SHARED_PREFIX:
            return 0
        in_prefill = self._active[self._decoding :]
        return max((each.cached.shared_length(wanted) for each in in_prefill), default=0)

    def _prefill_chunk(self) -> list[Token]:
        """Computes the next chunk of every prompt in prefill; complete ones get their first token.

        The chunk's budget is divided among the prompts, so all advance together.
        """
        first, last = self._decoding, len(self._active)
        # A bounded chunk, so that a step stays short and its memory known in advance.
        width = max(1, self.prefill_tokens // (last - first))
        cache = self._cache.span(first, last)
        chunks = [
            each.ids[length : min(length + width, each.prefill_length)]
            for each, length in zip(self._active[first:], cache.lengths, strict=True)
        ]
        counts = [len(chunk) for chunk in chunks]
        ids = self._padded(chunks)
        self._route(first, last, ids.shape[1])
        states = self.model.residual(ids, cache, counts)
        # The span is a view with its own lengths: write them back only after the step succeeded.
        self._cache.lengths[first:last] = cache.lengths
        self.prefilled_tokens += sum(counts)
        rows = list(zip(self._active[first:], cache.lengths, counts, states, strict=True))
        tokens = [
            token
            for each, end, count, state in rows
            for token in self._scored_prompt(each, end, state[:count])
        ]
        failed = {token.request for token in tokens if token.finish == "error"}
        complete = [
            i
            for i, (each, end, _, _) in enumerate(rows)
            if end == each.prefill_length and each.ticket not in failed
        ]
        scored_only = [rows[i][0] for i in complete if rows[i][0].request.max_new_tokens == 0]
        complete = [i for i in complete if rows[i][0].request.max_new_tokens > 0]
        if complete:
            # The head is by far the largest matrix: it reads the last position of each only.
            ends = torch.tensor([counts[i] - 1 for i in complete])
            logits = self.model.head(states[torch.tensor(complete), ends])
            for i in complete:  # ascending: a swap moves only rows that were visited before
                # The swaps keep this order, so row n of `logits` is of slot first + n.
                self._swap(first + i, self._decoding)
                self._decoding += 1
            tokens += self._sample(range(first, self._decoding), logits)
        # Last, because a release moves slots; each slot is looked up again by its request.
        for each in scored_only:
            self._release(self._active.index(each))
        for each in [each for each in self._active if each.ticket in failed]:
            self._release_failed(self._active.index(each))
        return tokens

    def _route(self, first: int, last: int, time: int) -> None:
        """Assigns the adapters of slots first .. last - 1 to the rows of the next forward."""
        adapters = [each.request.adapter for each in self._active[first:last]]
        self._routing.assign(adapters, time, self._cache.keys.device)

    def _padded(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        # Padded with a row's own last token: any other token could bring numbers that are not
        # finite into a healthy row.
        longest = max(map(len, chunks))
        rows = [[*ids, *[ids[-1]] * (longest - len(ids))] for ids in chunks]
        return torch.tensor(rows, device=self.model.embedding.device)

    def _scored_prompt(self, active: ActiveRequest, end: int, states: Tensor) -> list[Token]:
        """Scores the prompt's tokens that follow the positions of `states` [time, dim].

        The last of these positions is `end` - 1. Returns the error token alone where a number is
        not finite, and nothing where the request asks for no scores.
        """
        request = active.request
        if not states.sum(dtype=torch.float32).isfinite():
            return [active.error_token()]
        # The state of a position predicts the next token; the prompt's last one has none.
        start = end - len(states) + 1
        first = max(start, request.score_from)
        following = request.ids[first : end + 1]
        if not request.score_prompt or not following:
            return []
        logits = self.model.head(states[first - start :][: len(following)])
        if not _finite_rows(logits).all():
            return [active.error_token()]
        tokens = [
            replace(token, of_prompt=True)
            for token in tokens_with_log_probs([active] * len(following), following, logits)
        ]
        if request.max_new_tokens == 0 and end == active.prefill_length:
            tokens[-1] = replace(tokens[-1], finish="length")
        return tokens

    def _decode(self) -> list[Token]:
        """Computes one more token for every request in decoding."""
        count = self._decoding
        ids = torch.tensor([[each.ids[-1]] for each in self._active[:count]])
        cache = self._cache.span(0, count)
        # Decoding slots are contiguous, so the cache of the whole batch is one view without a copy.
        self._route(0, count, 1)
        states = self.model.residual(ids.to(self._cache.keys.device), cache)[:, -1]
        self._cache.lengths[:count] = cache.lengths
        return self._sample(range(count), self.model.head(states))

    def _sample(self, slots: range, logits: Tensor) -> list[Token]:
        """Chooses a token for each of the slots from logits [slots, vocab]; releases finished."""
        chosen_for = [self._active[slot] for slot in slots]
        finite = _finite_rows(logits)
        # Rows that are not finite become zeros, so that sampling cannot fail; their token is
        # replaced by the error token below.
        logits = logits if finite.all() else logits.where(finite[:, None], 0.0)
        samplings = [each.request.sampling for each in chosen_for]
        generated = [
            # A copy of all tokens so far, so it is made only where penalties read it.
            each.generated if each.request.sampling.adjusts_logits else ()
            for each in chosen_for
        ]
        ids = choose_tokens(logits, samplings, generated, [each.generator for each in chosen_for])
        for each, token in zip(chosen_for, ids, strict=True):
            # Appended first: finish_reason looks at the last id and at how many there are.
            each.ids.append(token)
        reasons = [each.finish_reason() for each in chosen_for]
        tokens = [
            token if reason is None else replace(token, finish=reason)
            for token, reason in zip(
                tokens_with_log_probs(chosen_for, ids, logits), reasons, strict=True
            )
        ]
        for i in (~finite).nonzero().flatten().tolist():
            tokens[i] = chosen_for[i].error_token()
        # From the last slot down: releasing a slot moves only slots behind it.
        for slot, token in reversed(list(zip(slots, tokens, strict=True))):
            if token.finish == "error":
                self._release_failed(slot)
            elif token.finish:
                self._release(slot)
        return tokens

    def _release_failed(self, slot: int) -> None:
        """Frees the slot of a request with numbers that are not finite, and removes them.

        Attention multiplies a masked value by zero, and zero times NaN is NaN. The other requests
        hold finite numbers only, so every bad number in the cache belongs to this one.
        """
        self._release(slot)
        self._finished.pop(len(self._active))
        for stored in (self._cache.keys, self._cache.values):
            stored.nan_to_num_(0.0, 0.0, 0.0)

    def _release(self, slot: int) -> None:
        """Frees a slot; its tokens move behind the slots in use, where new prompts can share them.

        A decoding slot first takes the last place of the decoding ones, then the last of all, so
        that the order [decoding | prefilling | free] stays.
        """
        if slot < self._decoding:
            self._decoding -= 1
            self._swap(slot, self._decoding)
            slot = self._decoding
        last = len(self._active) - 1
        self._swap(slot, last)
        self._finished[last] = self._active.pop().cached

    def _swap(self, a: int, b: int) -> None:
        self._cache.swap(a, b)
        self._active[a], self._active[b] = self._active[b], self._active[a]


def _finite_rows(logits: Tensor) -> Tensor:
    """Whether all of each row of [rows, vocab] are finite; summing is the fastest test."""
    return logits.sum(dim=-1, dtype=torch.float64).isfinite()
