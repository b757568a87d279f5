"""Continuous batching and prefix sharing change no completion and save work."""

import random

import pytest
import torch
from tiny_models import tiny

from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

GREEDY = Sampling(temperature=0)


def alone(model, request):
    return Engine(model, slots=1).completions([request])[0]


def finish(engine, tickets):
    """Steps until idle: the ids of each ticket."""
    made = {ticket: [] for ticket in tickets}
    while engine.busy:
        for token in engine.step():
            made[token.request].append(token.id)
    return made


@pytest.mark.parametrize("prefill_tokens", [1, 3, 7, 64])
def test_chunked_prefill_equals_whole_prefill(any_model, prefill_tokens):
    requests = [Request(list(range(i, i + 23)), 8, GREEDY) for i in range(4)]
    engine = Engine(any_model, slots=3, prefill_tokens=prefill_tokens)
    assert engine.completions(requests) == [alone(any_model, request) for request in requests]


def test_requests_at_any_time_get_the_same_completions_as_alone():
    """256 requests of every kind, submitted and cancelled between steps, at random."""
    model, draw = tiny(), random.Random(0)
    engine = Engine(model, slots=5, prefill_tokens=16)
    requests, cancelled, generated = {}, set(), {}
    while len(requests) < 256 or engine.busy:
        for _ in range(draw.randrange(4) if len(requests) < 256 else 0):
            start = draw.randrange(3)
            prompt = [start + i % 60 for i in range(draw.randrange(1, 50))]
            how = draw.choice([GREEDY, Sampling(seed=draw.randrange(99))])
            request = Request(prompt, draw.randrange(1, 9), how)
            requests[engine.submit(request)] = request
        if draw.random() < 0.1:
            ticket = draw.choice([*requests, 0]) if requests else 0
            engine.cancel(ticket)
            cancelled.add(ticket)
        for token in engine.step():
            assert token.request not in cancelled
            generated.setdefault(token.request, []).append(token.id)
    for ticket, request in requests.items():
        if ticket not in cancelled:
            assert generated[ticket] == alone(model, request)
        else:
            whole = alone(model, request)
            assert generated.get(ticket, []) == whole[: len(generated.get(ticket, []))]


def test_samples_of_one_prompt_prefill_it_once():
    model, prompt = tiny(), list(range(60))
    requests = [Request(prompt, 4, Sampling(seed=i)) for i in range(8)]
    engine = Engine(model, slots=8)
    completions = engine.completions(requests)
    assert engine.prefilled_tokens == len(prompt) + 7
    assert completions == [alone(model, request) for request in requests]
    assert len({tuple(completion) for completion in completions}) > 1


def test_the_prefix_of_a_finished_request_is_reused():
    model, system = tiny(), list(range(50))
    engine = Engine(model, slots=2)
    for i in range(4):
        request = Request([*system, 60 + i, 1, 2], 3, GREEDY)
        assert engine.completions([request])[0] == alone(model, request)
    assert engine.prefilled_tokens == 53 + 3 * 3


def test_a_conversation_reuses_its_generated_tokens():
    model = tiny()
    engine = Engine(model)
    first = Request(list(range(20)), 6, GREEDY)
    completion = engine.completions([first])[0]
    second = Request([*first.ids, *completion, 7, 8], 4, GREEDY)
    assert engine.completions([second])[0] == alone(model, second)
    assert engine.prefilled_tokens == 20 + 3  # the last generated token was never read


def test_refresh_empties_the_cache():
    model, other = tiny(seed=0), tiny(seed=1)
    engine, request = Engine(model), Request(list(range(40)), 5, GREEDY)
    engine.completions([request])
    engine.refresh(other)
    assert engine.completions([request])[0] == alone(other, request)


def test_leaving_early_frees_every_slot():
    engine = Engine(tiny(), slots=2)
    stream = engine.generate([Request([1, 2], 50, GREEDY) for _ in range(5)])
    for _ in range(7):
        next(stream)
    stream.close()
    assert not engine.busy
    assert finish(engine, [engine.submit(Request([3], 2, GREEDY))])


def test_a_long_prompt_does_not_delay_the_others():
    """While it is read in chunks, those that are decoding get a token every step."""
    engine = Engine(tiny(), slots=2, prefill_tokens=4)
    short = engine.submit(Request([1], 30, GREEDY))
    engine.step()
    engine.submit(Request(list(range(60)), 1, GREEDY))
    for _ in range(10):
        assert [token.request for token in engine.step()] == [short]


def test_an_engine_in_flight_takes_no_new_weights():
    engine = Engine(tiny())
    engine.submit(Request([1], 2, GREEDY))
    with pytest.raises(AssertionError, match="in flight"):
        engine.refresh(tiny())


def test_the_cache_grows_with_the_reserved_tokens():
    engine = Engine(tiny(), slots=2, prefill_tokens=8)
    engine.completions([Request([1] * 10, 5, GREEDY)])
    assert engine._cache.capacity == 256
    engine.completions([Request([1] * 300, 5, GREEDY)])
    assert engine._cache.capacity == 512
    assert engine._cache.keys.dtype == torch.float32
