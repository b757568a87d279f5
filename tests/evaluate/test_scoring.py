"""Scores of continuations equal those of all logits at once, however they are batched."""

import random

import pytest
import torch
from tiny_models import tiny

from openpalm.errors import SettingsError
from openpalm.evaluate.scoring import Pair, rolling_windows, score_pairs
from openpalm.generate.engine import Engine


def random_pairs(count, vocabulary):
    """Contexts of which some are the same or begin alike, as in questions with several choices."""
    draw = random.Random(0)
    contexts = [
        [draw.randrange(vocabulary) for _ in range(draw.randrange(1, 60))] for _ in range(6)
    ]
    contexts += [[*contexts[0][:20], 1, 2, 3], contexts[0] + contexts[1]]
    lengths = [1, 2, 17]
    return [
        Pair(
            draw.choice(contexts), [draw.randrange(vocabulary) for _ in range(draw.choice(lengths))]
        )
        for _ in range(count)
    ]


@torch.no_grad()
def direct(model, pair):
    logits = model.logits(torch.tensor([pair.context + pair.continuation])).double()
    log_probs = logits[0, len(pair.context) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(pair.continuation)
    greedy = bool((log_probs.argmax(-1) == wanted).all())
    return log_probs.gather(-1, wanted[:, None]).sum().item(), greedy


@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (1, 8), (4, 512), (5, 16)])
def test_scores_are_those_of_the_logits(slots, prefill_tokens):
    model = tiny()
    pairs = random_pairs(40, model.config.vocab_size)
    with torch.no_grad():  # some continuations are the greedy ones
        for i in range(0, 40, 4):
            likeliest = model.logits(torch.tensor([pairs[i].context]))[0, -1].argmax().item()
            pairs[i] = Pair(pairs[i].context, [likeliest])
    done = []
    found = score_pairs(
        Engine(model, slots=slots, prefill_tokens=prefill_tokens), pairs, done.append
    )
    expected = [direct(model, pair) for pair in pairs]
    assert [score.log_prob for score in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert [score.is_greedy for score in found] == [greedy for _, greedy in expected]
    assert sum(score.is_greedy for score in found) >= 10
    assert sum(done) == len(pairs)


def test_pairs_with_one_context_compute_it_once():
    model = tiny()
    context = list(range(50))
    engine = Engine(model, slots=4)
    score_pairs(engine, [Pair(context, [i, i + 1]) for i in range(4)])
    assert engine.prefilled_tokens < 2 * len(context)


def test_nothing_has_probability_one():
    found = score_pairs(Engine(tiny()), [Pair([1, 2], []), Pair([1], [])])
    assert [tuple(score) for score in found] == [(0.0, True)] * 2


def test_an_unknown_id_is_refused():
    model = tiny()
    with pytest.raises(SettingsError, match="the model's vocabulary has"):
        score_pairs(Engine(model), [Pair([1], [model.config.vocab_size])])


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_windows_predict_every_token_once(overlap):
    for count in range(30):
        ids = list(range(1, count + 1))
        windows = rolling_windows(ids, 0, 5, overlap)
        assert [i for window in windows for i in window.continuation] == ids
        assert all(len(w.context) + len(w.continuation) <= 6 for w in windows)
        # The context is what precedes, and never shorter than the overlap after the first.
        for window in windows:
            assert window.context == list(range(window.continuation[0])[-len(window.context) :])
        assert all(len(window.context) > overlap for window in windows[1:])
