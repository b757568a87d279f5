"""Log-probabilities of continuations after their contexts, in windows of the model's context.

Works on token ids, through the engine; never holds the logits of more than one chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

Ids = list[int]
Advance = Callable[[int], None]
_REQUESTS_AT_A_TIME = 1024
"""Submitted together; each has a random generator, so all of a large task would take memory."""


class Pair(NamedTuple):
    """A continuation and what precedes it; both without end markers."""

    context: Ids
    """at least one token"""
    continuation: Ids


class Score(NamedTuple):
    log_prob: float
    """natural log of the continuation's probability"""
    is_greedy: bool
    """whether greedy decoding of the context gives the continuation"""


def score_pairs(
    engine: Engine, pairs: Sequence[Pair], advance: Advance = lambda more: None
) -> list[Score]:
    """The score of every pair; `advance` is called with the number of pairs done since.

    Pairs of about the same length run together, and pairs with one context share its keys and
    values. With an engine of one slot nothing is shared, so that every pair is computed exactly as
    the server computes it for a client that sends one request at a time.
    """
    order = sorted(range(len(pairs)), key=lambda i: _longest_first(pairs[i]))
    scores = [Score(0.0, True)] * len(pairs)  # of an empty continuation
    for first in range(0, len(order), _REQUESTS_AT_A_TIME):
        group = order[first : first + _REQUESTS_AT_A_TIME]
        for i, score in _score_group(engine, [(i, pairs[i]) for i in group], advance):
            scores[i] = score
    return scores


def _longest_first(pair: Pair) -> tuple[int, Ids, int]:
    """Sorts by length of the context; pairs with the same context stay together."""
    return (-len(pair.context), pair.context, -len(pair.continuation))


def _score_group(
    engine: Engine, group: Sequence[tuple[int, Pair]], advance: Advance
) -> Iterator[tuple[int, Score]]:
    log_probs: list[list[float]] = [[] for _ in group]
    greedy = [True] * len(group)
    alone = engine.slots == 1
    finished = 0
    requests = [_request(pair, alone=alone) for _, pair in group]
    for token in engine.generate(requests):
        if token.of_prompt:
            log_probs[token.request].append(token.log_prob)
            # Of a whole prompt only the continuation's tokens count.
            start = len(group[token.request][1].context) - requests[token.request].score_from
            if len(log_probs[token.request]) > start:
                greedy[token.request] &= token.top[0][0] == token.id
        if token.finish:
            finished += 1
            advance(1)
    advance(len(group) - finished)  # pairs without a continuation yield no token
    for n, (i, pair) in enumerate(group):
        start = len(pair.context) - requests[n].score_from
        yield i, Score(float(sum(log_probs[n][start:])), greedy[n])


def _request(pair: Pair, *, alone: bool) -> Request:
    ids = pair.context + pair.continuation
    # The server scores the whole prompt of `echo` and generates at least one token.
    if alone and pair.continuation:
        return Request(ids, 1, Sampling(temperature=0), frozenset(), 1, score_prompt=True)
    return Request(ids, 0, top_log_probs=1, score_prompt=True, score_from=len(pair.context))


def rolling_windows(ids: Sequence[int], prefix: int, length: int, overlap: int = 0) -> list[Pair]:
    """Windows of at most `length` + 1 tokens that predict each of `ids` once; `prefix` precedes.

    The first window predicts `length` tokens. Each later one predicts `length` - `overlap`, after
    the last `overlap` + 1 tokens of the text before; the last window is moved back to be full.
    With `overlap` 0 these are the windows of lm-evaluation-harness, and of its
    `make_disjoint_window`.
    """
    tokens = [prefix, *ids]
    pairs, predicted = [], 1
    while predicted < len(tokens):
        size = length if predicted == 1 else length - overlap
        end = min(predicted + size, len(tokens))
        start = max(0, end - length - 1)
        pairs.append(Pair(tokens[start:predicted], tokens[predicted:end]))
        predicted = end
    return pairs
