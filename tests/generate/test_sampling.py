"""Sampling against closed forms, enumeration and counted draws."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from openpalm.errors import SettingsError
from openpalm.generate.sampling import Sampling, adjusted, choose_tokens, distribution, draw

LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.3, -1.0, -4.0, 0.9, 2.1])


def softmax(logits, temperature=1.0):
    """In Python's doubles, term by term."""
    terms = [math.exp(x / temperature) for x in logits]
    return [term / sum(terms) for term in terms]


def kept(probabilities):
    return {i for i, p in enumerate(probabilities.tolist()) if p > 0}


def random_logits(count, size, spread=2.0):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(count, size, generator=generator) * spread


# --- temperature


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 50.0])
def test_temperature_divides_the_logits(temperature):
    expected = torch.tensor(softmax(LOGITS.tolist(), temperature))
    found = distribution(LOGITS, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_temperature_zero_is_the_best_token():
    assert distribution(LOGITS, temperature=0).tolist() == [0, 0, 0, 0, 0, 0, 0, 1]


def test_temperature_zero_takes_one_of_equals():
    probabilities = distribution(torch.tensor([1.0, 3.0, 3.0, 3.0]), temperature=0)
    assert sorted(probabilities.tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-40, 5e-324])
def test_small_temperatures_tend_to_the_best_token(temperature):
    for logits in (LOGITS, LOGITS * 1e4, LOGITS - 1e3):
        found = distribution(logits, temperature=temperature)
        torch.testing.assert_close(found, distribution(logits, temperature=0))


def test_great_temperatures_tend_to_equal_chances():
    found = distribution(LOGITS, temperature=1e6)
    torch.testing.assert_close(found, torch.full_like(LOGITS, 1 / len(LOGITS)), rtol=1e-4, atol=0)


def test_only_differences_of_logits_count():
    shifted = distribution(LOGITS + 1000, temperature=0.7)
    torch.testing.assert_close(shifted, distribution(LOGITS, temperature=0.7), rtol=1e-3, atol=1e-6)


# --- top-k


@pytest.mark.parametrize("size", [3, 17, 100])
def test_top_k_keeps_exactly_the_k_best(size):
    for logits in random_logits(20, size):
        for k in range(1, size):
            found = distribution(logits, top_k=k)
            best = sorted(range(size), key=lambda i: -float(logits[i]))[:k]
            assert kept(found) == set(best)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_top_k_keeps_exactly_k_of_equals(k):
    logits = torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found = distribution(logits, top_k=k)
    assert len(kept(found)) == k
    assert 1 in kept(found)
    assert float(found.sum()) == pytest.approx(1)


def test_top_k_renormalises_what_is_left():
    found = distribution(LOGITS, top_k=2)
    first, second = softmax([2.1, 2.0])
    assert found[7].item() == pytest.approx(first, rel=1e-5)
    assert found[0].item() == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("k", [0, len(LOGITS), len(LOGITS) + 1, 10**6])
def test_top_k_of_all_or_zero_keeps_all(k):
    torch.testing.assert_close(distribution(LOGITS, top_k=k), LOGITS.softmax(dim=-1))


def test_top_k_of_one_is_greedy_at_any_temperature():
    assert torch.equal(
        distribution(LOGITS, temperature=9.0, top_k=1), distribution(LOGITS, temperature=0)
    )


# --- top-p


def smallest_sets(chances, p):
    """All sets of the smallest size that hold p, by trying every set."""
    ids = range(len(chances))
    for size in range(1, len(chances) + 1):
        sets = [s for s in itertools.combinations(ids, size) if sum(chances[i] for i in s) >= p]
        if sets:
            return sets
    return [tuple(ids)]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.77, 0.9, 0.999])
def test_top_p_keeps_the_likeliest_of_the_smallest_sets(p):
    for logits in random_logits(40, 7):
        chances = softmax(logits.double().tolist())
        expected = max(smallest_sets(chances, p), key=lambda s: sum(chances[i] for i in s))
        found = distribution(logits, top_p=p)
        assert kept(found) == set(expected)
        total = sum(chances[i] for i in expected)
        for i in expected:
            assert found[i].item() == pytest.approx(chances[i] / total, rel=1e-4)


def test_top_p_at_the_very_edge():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert len(kept(distribution(logits, top_p=0.5 - 1e-3))) == 1
    assert len(kept(distribution(logits, top_p=0.5 + 1e-3))) == 2
    assert len(kept(distribution(logits, top_p=0.75 + 1e-3))) == 3


@pytest.mark.parametrize("p", [1e-9, 1e-40, 5e-324])
def test_top_p_always_keeps_one(p):
    """Also where float32 takes p for zero."""
    assert kept(distribution(LOGITS, top_p=p)) == {7}


def test_top_p_of_one_keeps_all():
    torch.testing.assert_close(distribution(LOGITS, top_p=1.0), LOGITS.softmax(dim=-1))


def test_top_p_holds_its_share_of_what_top_k_left():
    for logits in random_logits(40, 8):
        best = sorted(range(8), key=lambda i: -float(logits[i]))[:4]
        chances = softmax([float(logits[i]) / 1.7 for i in best])
        size = len(smallest_sets(chances, 0.6)[0])
        found = distribution(logits, temperature=1.7, top_k=4, top_p=0.6)
        assert kept(found) == set(best[:size])


# --- draws


def chi_squared_chance(counts, probabilities, draws):
    """The chance of a fit at least this bad, if the draws follow the probabilities."""
    cells = [(counts[i], draws * p) for i, p in enumerate(probabilities) if p > 0]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    return float(
        torch.special.gammaincc(
            torch.tensor(freedom / 2, dtype=torch.float64),
            torch.tensor(statistic / 2, dtype=torch.float64),
        )
    )


def drawn(probabilities, draws, seed):
    generator = torch.Generator().manual_seed(seed)
    return Counter(draw(probabilities, generator) for _ in range(draws))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, softmax(LOGITS.tolist())),
        ({"temperature": 0.5}, softmax(LOGITS.tolist(), 0.5)),
        ({"temperature": 3.0}, softmax(LOGITS.tolist(), 3.0)),
        ({"top_k": 2}, [softmax([2.1, 2.0])[1], 0, 0, 0, 0, 0, 0, softmax([2.1, 2.0])[0]]),
    ],
)
def test_frequencies_follow_the_probabilities(how, expected):
    counts = drawn(distribution(LOGITS, **how), 50_000, seed=1)
    assert set(counts) <= {i for i, p in enumerate(expected) if p > 0}
    assert chi_squared_chance(counts, expected, 50_000) > 1e-3


def test_the_frequency_test_notices_a_wrong_temperature():
    counts = drawn(distribution(LOGITS, temperature=1.05), 50_000, seed=1)
    assert chi_squared_chance(counts, softmax(LOGITS.tolist()), 50_000) < 1e-3


def test_a_seed_repeats_its_draws():
    probabilities = distribution(LOGITS)

    def sequence(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw(probabilities, generator) for _ in range(50)]

    assert sequence(5) == sequence(5)
    assert sequence(5) != sequence(6)


def test_impossible_tokens_are_never_drawn():
    logits = LOGITS.clone()
    logits[[0, 7]] = -torch.inf
    for how in ({}, {"top_k": 7}, {"top_p": 0.999}, {"temperature": 100.0}):
        assert not {0, 7} & set(drawn(distribution(logits, **how), 2000, seed=3))


# --- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 101.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", 2**63),
    ],
)
def test_settings_out_of_range_name_option_and_value(name, value):
    with pytest.raises(SettingsError) as error:
        Sampling(**{name: value})
    assert f"--{name.replace('_', '-')} {value}: must be" in str(error.value)


def test_probabilities_sum_to_one_whatever_is_asked():
    rng = random.Random(0)
    for logits in random_logits(50, 33):
        how = {
            "temperature": rng.uniform(0.01, 10),
            "top_k": rng.randrange(40),
            "top_p": rng.uniform(0.01, 1),
        }
        found = distribution(logits, **how)
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)
        assert float(found.min()) >= 0


# --- min-p, bias, penalties, rows


@pytest.mark.parametrize("min_p", [0.05, 0.3, 0.6, 1.0])
def test_min_p_keeps_a_share_of_the_best(min_p):
    for logits in random_logits(20, 30):
        chances = softmax(logits.double().tolist())
        least = min_p * max(chances)
        found = distribution(logits, min_p=min_p)
        assert kept(found) == {i for i, p in enumerate(chances) if p >= least - 1e-9}
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_top_p_beyond_the_short_list_is_top_p():
    """A flat distribution over more tokens than are looked at first."""
    logits = torch.linspace(0, 0.1, 5000)
    assert len(kept(distribution(logits, top_p=0.9))) == pytest.approx(4500, abs=30)
    few = kept(distribution(logits, top_p=0.01))
    assert few == set(range(5000 - len(few), 5000))


def test_bias_and_penalties_are_the_documented_sum():
    how = Sampling(
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={0: 1.0, 3: -2.0, 5: 7.0}
    )
    generated = [3, 3, 3, 1]
    expected = [
        x + how.logit_bias.get(i, 0) - generated.count(i) * 0.25 - (0.5 if i in generated else 0)
        for i, x in enumerate(LOGITS.tolist())
    ]
    assert adjusted(LOGITS, how, generated).tolist() == pytest.approx(expected)
    assert adjusted(LOGITS, Sampling(), generated) is LOGITS


def test_each_row_is_chosen_as_alone():
    samplings = [
        Sampling(temperature=0),
        Sampling(seed=1),
        Sampling(temperature=0, logit_bias={2: 50.0}),
        Sampling(top_k=3, top_p=0.8, min_p=0.1, seed=4),
    ]
    logits, generated = random_logits(4, 50), [[1, 2], [], [3], [4] * 5]

    def generators():
        return [torch.Generator().manual_seed(how.seed) for how in samplings]

    together = choose_tokens(logits, samplings, generated, generators())
    alone = []
    for i in range(4):
        row = slice(i, i + 1)
        alone += choose_tokens(logits[row], samplings[row], generated[row], generators()[row])
    assert together == alone
    assert together[2] == 2
    assert together[0] == int(logits[0].argmax())


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"min_p": 0.5}, [2.0, 1.5, 1.5, None, None, None, None, 2.1]),
        ({"logit_bias": {5: 6.0}}, [2.0, 1.5, 1.5, 0.3, -1.0, 2.0, 0.9, 2.1]),
        ({"presence_penalty": 2.0}, [0.0, 1.5, 1.5, 0.3, -1.0, -4.0, 0.9, 2.1]),
    ],
)
def test_frequencies_of_whole_requests_follow_the_probabilities(how, expected):
    """Through `choose_tokens`, as in the engine; token 0 was generated before."""
    generator, settings = torch.Generator().manual_seed(9), Sampling(**how)
    draws = [choose_tokens(LOGITS[None], [settings], [[0]], [generator])[0] for _ in range(30_000)]
    chances = softmax([x if x is not None else -1e9 for x in expected])
    assert chi_squared_chance(Counter(draws), chances, 30_000) > 1e-3
