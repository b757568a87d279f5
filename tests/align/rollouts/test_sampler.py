"""The sampler's frequencies and log-probabilities are those that the policy is scored by."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from enumerable import ANSWERS, END, PROMPTS
from rollouts import every_completion, grpo, moved

from openpalm.align.logprobs import evaluate
from openpalm.align.rollouts.rollout_batch import collate_completions
from openpalm.align.rollouts.sampler import Sampler


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def counts_of(temperature, draws):
    """How often each of the 341 completions of the first prompt is sampled."""
    settings = grpo(temperature=temperature)
    # Many slots: the forward passes then cost little beside the draws.
    sampler = Sampler(moved(), PROMPTS, frozenset({END}), settings, slots=512)
    sampler.refresh()
    counts = Counter(tuple(a.ids) for a in sampler.sample([0], draws))
    return torch.tensor([float(counts[tuple(a)]) for a in ANSWERS])


def check_frequencies(counts, log_probs):
    """Pearson's chi-squared, cells below five expected together; five deviations at most."""
    draws = counts.sum().item()
    expected = log_probs.double().sum(dim=-1).exp() * draws
    assert expected.sum().item() == pytest.approx(draws, rel=1e-4)
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(seen) - 1
    statistic = ((seen - wanted).square() / wanted).sum().item()
    assert freedom > 50
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_completions_are_sampled_as_they_are_scored(temperature):
    counts, model = counts_of(temperature, draws=20_000), moved()
    scored = partial(evaluate, model, *every_completion())
    check_frequencies(counts, scored(temperature=temperature).log_probs)
    other = 0.75 if temperature != 1 else 0.95
    fails(check_frequencies, counts, scored(temperature=other).log_probs)
    fails(check_frequencies, counts, evaluate(moved(seed=1), *every_completion()).log_probs)
    if temperature != 1:  # the whole completion's probability tempered, not each token's
        whole = scored(temperature=1.0).log_probs.double().sum(dim=-1) / temperature
        fails(check_frequencies, counts, whole.log_softmax(dim=-1)[:, None])


def test_the_samplers_own_log_probabilities_are_the_scorers():
    model, settings = moved(), grpo(num_completions=8)
    sampler = Sampler(model, PROMPTS, frozenset({END}), settings)
    sampler.refresh()
    completions = sampler.sample([0, 1, 2, 3], 8)
    inputs, targets = collate_completions(completions)
    with torch.no_grad():
        scored = evaluate(model, inputs, targets).log_probs[targets >= 0]
    reported = torch.tensor([value for c in completions for value in c.log_probs])
    assert torch.allclose(scored, reported, atol=1e-5)
    assert all(c.ended == (c.ids[-1] == END) for c in completions)
    assert {c.ended for c in completions} == {True, False}
