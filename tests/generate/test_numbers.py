"""Logits that are not finite: an error of the request that is hit, and of no other."""

import math

import pytest
import torch
from tiny_models import tiny

from openpalm.errors import NumbersError, SettingsError
from openpalm.generate.engine import Engine
from openpalm.generate.request import NO_TOKEN, Request
from openpalm.generate.sampling import Sampling, draw

SAMPLINGS = [Sampling(temperature=0), Sampling(seed=1), Sampling(0.7, 20, 0.9, 4)]


def poisoned(value=math.nan):
    """A model that computes nan after token 7 alone."""
    model = tiny(tied=False)
    with torch.no_grad():
        model.embedding[7] = value
    return model


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_token_comes_of_numbers_that_are_not_finite(how, value):
    for request in (Request([1, 7, 2], 4, how), Request([1, 7, 2], 0, score_prompt=True)):
        with pytest.raises(NumbersError, match="not finite"):
            list(Engine(poisoned(value)).generate([request]))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_the_neighbours_complete_as_alone(slots):
    model = poisoned()
    healthy = [Request([*range(20, 20 + n)], 9, SAMPLINGS[n % 3]) for n in (1, 4, 17)]
    hit = [Request([1] * n + [7] + [2] * n, 9, SAMPLINGS[0]) for n in (0, 3, 30)]
    alone = [Engine(model).completions([request])[0] for request in healthy]
    engine = Engine(model, slots=slots, prefill_tokens=16)
    tickets = [engine.submit(r) for pair in zip(hit, healthy, strict=True) for r in pair]
    found = {ticket: [] for ticket in tickets}
    while engine.busy:
        for token in engine.step():
            found[token.request].append(token)
    for ticket in tickets[::2]:
        [token] = found[ticket]
        assert (token.id, token.finish) == (NO_TOKEN, "error")
    assert [[token.id for token in found[ticket]] for ticket in tickets[1::2]] == alone
    assert engine.completions(healthy) == alone  # in the slots of the failed requests


def test_nothing_is_drawn_from_probabilities_that_are_not_finite():
    with pytest.raises(NumbersError):
        draw(torch.full((5,), math.nan), torch.Generator())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_change_of_a_logit_is_a_number(value):
    for change in ({"logit_bias": {3: value}}, {"presence_penalty": value}):
        with pytest.raises(SettingsError, match="must be a number from"):
            Sampling(**change)
