"""The engine equals recomputing everything, alone, one token at a time."""

import pytest
import torch
from tiny_models import tiny

from openpalm.errors import SettingsError
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling, distribution, draw

GREEDY = Sampling(temperature=0)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [60, 3], [9, 9, 9, 9], list(range(30)), [0, 69]]


@torch.no_grad()
def recomputed(model, request):
    """Tokens and log-probabilities with no cache: the whole text through the model every time."""
    how, ids, log_probs = request.sampling, list(request.ids), []
    generator = torch.Generator().manual_seed(how.seed)
    while len(log_probs) < request.max_new_tokens:
        logits = model.logits(torch.tensor([ids]))[0, -1]
        chances = distribution(
            logits, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
        )
        ids.append(draw(chances, generator))
        log_probs.append(logits.log_softmax(dim=-1)[ids[-1]].item())
        if ids[-1] in request.stop_ids:
            break
    return ids[len(request.ids) :], log_probs


def mixed_requests():
    """Different lengths, temperatures, filters, stops and room."""
    stops = [frozenset(), frozenset(range(30)), frozenset({7})]
    samplings = [GREEDY, Sampling(seed=3), Sampling(0.7, 20, 0.9, 4), Sampling(2.0, seed=-5)]
    return [
        Request(prompt, 3 + 5 * i, samplings[i % 4], stops[i % 3])
        for i, prompt in enumerate(PROMPTS)
    ]


def generated(engine, requests):
    """(ids, log-probabilities, finish) of every request; the order of tokens checked."""
    found = [([], [], []) for _ in requests]
    for token in engine.generate(requests):
        ids, log_probs, finish = found[token.request]
        assert finish in ([], [None] * len(finish)), "a token after the end"
        ids.append(token.id)
        log_probs.append(token.log_prob)
        finish.append(token.finish)
    return found


def test_greedy_with_cache_is_greedy_without(any_model):
    for prompt in PROMPTS:
        request = Request(prompt, 20, GREEDY)
        assert Engine(any_model).completions([request])[0] == recomputed(any_model, request)[0]


def test_greedy_takes_the_best_token_each_time(any_model):
    ids = Engine(any_model).completions([Request([1, 2, 3], 12, GREEDY)])[0]
    whole = torch.tensor([[1, 2, 3, *ids]])
    with torch.no_grad():
        best = any_model.logits(whole)[0].argmax(dim=-1).tolist()
    assert ids == best[2:-1]


def test_batched_equals_alone_equals_recomputed(any_model):
    requests = mixed_requests()
    together = generated(Engine(any_model), requests)
    assert {finish[-1] for _, _, finish in together} == {"stop", "length"}
    for request, (ids, log_probs, _) in zip(requests, together, strict=True):
        assert Engine(any_model).completions([request]) == [ids]
        expected, expected_log_probs = recomputed(any_model, request)
        assert ids == expected
        assert log_probs == pytest.approx(expected_log_probs, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 2, 4, 5])
def test_more_requests_than_slots(model, slots):
    requests = mixed_requests()
    assert Engine(model, slots=slots).completions(requests) == Engine(model).completions(requests)


def test_neighbours_do_not_change_a_completion(model):
    requests = mixed_requests()
    backwards = Engine(model).completions(requests[::-1])
    assert backwards[::-1] == Engine(model).completions(requests)


def test_no_requests_give_no_tokens(model):
    assert Engine(model).completions([]) == []
    assert Engine(model).score([]) == []


def test_tokens_come_as_they_are_made(model):
    stream = Engine(model).generate([Request([1], 100, GREEDY), Request([2], 100, GREEDY)])
    assert [next(stream).request for _ in range(4)] == [0, 1, 0, 1]
    stream.close()


def test_seeds(model):
    def completion(seed):
        return Engine(model).completions([Request([1, 2], 30, Sampling(seed=seed))])[0]

    assert completion(1) == completion(1)
    assert completion(1) != completion(2)


def test_equal_requests_get_equal_completions(model):
    first, second = Engine(model).completions([Request([1, 2], 30, Sampling(seed=8))] * 2)
    assert first == second


@torch.no_grad()
def test_score_is_the_log_softmax_of_one_token_at_a_time(any_model):
    sequences = [[1, 2, 3, 4, 5, 6, 7], [9], [60, 61], list(range(40))]
    scores = Engine(any_model, slots=3).score(sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        expected = [
            any_model.logits(torch.tensor([sequence[:t]]))[0, -1].log_softmax(-1)[sequence[t]]
            for t in range(1, len(sequence))
        ]
        assert score.tolist() == pytest.approx([x.item() for x in expected], abs=1e-5)


def test_log_probs_of_generation_are_the_score(any_model):
    """The model's own, whatever the temperature and the filters were."""
    engine = Engine(any_model)
    requests = mixed_requests()
    found = generated(engine, requests)
    scores = engine.score([[*r.ids, *ids] for r, (ids, _, _) in zip(requests, found, strict=True)])
    for request, (_, log_probs, _), score in zip(requests, found, scores, strict=True):
        assert log_probs == pytest.approx(score[len(request.ids) - 1 :].tolist(), abs=1e-5)


# --- ends


def test_stop_id_is_the_last_token(model):
    free = Engine(model).completions([Request([1], 40, Sampling(seed=1))])[0]
    stop = free[10]
    first = free.index(stop)
    tokens = list(Engine(model).generate([Request([1], 40, Sampling(seed=1), frozenset({stop}))]))
    assert [token.id for token in tokens] == free[: first + 1]
    assert [token.finish for token in tokens] == [None] * first + ["stop"]


def test_length_ends_where_no_stop_comes(model):
    tokens = list(Engine(model).generate([Request([1], 7, GREEDY)]))
    assert [token.finish for token in tokens] == [None] * 6 + ["length"]


def test_a_stop_at_the_last_token_is_a_stop(model):
    best = Engine(model).completions([Request([1], 1, GREEDY)])[0][0]
    (token,) = Engine(model).generate([Request([1], 1, GREEDY, frozenset({best}))])
    assert token.finish == "stop"


def test_one_token(model):
    (token,) = Engine(model).generate([Request([1, 2], 1, GREEDY)])
    assert (token.request, token.finish) == (0, "length")


def test_requests_for_no_tokens(model):
    requests = [Request([1], 0), Request([1], 2, GREEDY)]
    assert [len(ids) for ids in Engine(model).completions(requests)] == [0, 2]


# --- what is refused


@pytest.mark.parametrize("ids", [[], [265], [1, -1], [1, 10**9], [-(10**9), 3]])
def test_bad_ids_are_refused_before_anything_is_made(model, ids):
    engine = Engine(model)
    with pytest.raises(SettingsError, match=r"empty|vocabulary has 265"):
        next(engine.generate([Request([1], 3), Request(ids, 3)]))
    with pytest.raises(SettingsError, match=r"empty|vocabulary has 265"):
        engine.score([[1, 2], ids])


def test_ids_of_padding_rows_are_refused():
    with pytest.raises(SettingsError, match="token id 70: the model's vocabulary has 70"):
        Engine(tiny(vocab_size=70)).completions([Request([70], 1)])


def test_a_bidirectional_model_is_refused():
    with pytest.raises(SettingsError, match="bidirectional"):
        Engine(tiny(causal=False))


def test_padding_ids_are_never_drawn_and_all_others_are():
    engine = Engine(tiny(vocab_size=70), slots=50)
    requests = [Request([i], 60, Sampling(temperature=100.0, seed=i)) for i in range(50)]
    assert {i for ids in engine.completions(requests) for i in ids} == set(range(70))


def test_the_engine_leaves_dropout_off():
    model = tiny(dropout=0.5).train()
    requests = [Request([1, 2, 3], 20, GREEDY)]
    assert Engine(model).completions(requests) == Engine(tiny()).completions(requests)


# --- log-probabilities of prompt and likeliest tokens


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_the_model(any_model):
    request = Request([1, 2, 3], 8, Sampling(seed=2), top_log_probs=4)
    ids = [1, 2, 3]
    for token in Engine(any_model).generate([request, Request([5], 9, GREEDY)]):
        if token.request == 0:
            log_probs = any_model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
            best = log_probs.topk(4)
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
            ids.append(token.id)
        else:
            assert token.top == ()


@pytest.mark.parametrize("prefill_tokens", [1, 5, 64])
def test_a_scored_prompt_comes_before_its_completion(any_model, prefill_tokens):
    """Among others that read, decode and share beginnings."""
    prompts = [list(range(i, i + 30)) for i in (0, 0, 7)]
    engine = Engine(any_model, slots=4, prefill_tokens=prefill_tokens)
    requests = [Request(p, 5, GREEDY, top_log_probs=2, score_prompt=True) for p in prompts]
    found = list(engine.generate([*requests, Request(prompts[0], 9, GREEDY)]))
    for position, prompt in enumerate(prompts):
        mine = [token for token in found if token.request == position]
        assert [t.of_prompt for t in mine] == [True] * 29 + [False] * 5
        assert [t.id for t in mine[:29]] == prompt[1:]
        assert all(len(t.top) == 2 and t.finish is None for t in mine[:-1])
        expected = Engine(any_model).score([prompt])[0].tolist()
        assert [t.log_prob for t in mine[:29]] == pytest.approx(expected, abs=1e-5)
        assert [t.id for t in mine[29:]] == Engine(any_model).completions([requests[position]])[0]


def test_a_score_ends_with_the_prompt(model):
    tokens = list(Engine(model).generate([Request([1, 2, 3], 0, score_prompt=True)]))
    assert [(t.id, t.of_prompt, t.finish) for t in tokens] == [
        (2, True, None),
        (3, True, "length"),
    ]
    assert list(Engine(model).generate([Request([1], 0, score_prompt=True)])) == []


def test_penalties_count_the_completion_only(model):
    """A penalty of 2 a time, on logits this far apart, in the end changes what is greedy."""
    plain = Engine(model).completions([Request([1, 2, 3], 40, GREEDY)])[0]
    how = Sampling(temperature=0, frequency_penalty=2.0)
    penalised = Engine(model).completions([Request([1, 2, 3], 40, how)])[0]
    first = next(i for i, (a, b) in enumerate(zip(plain, penalised, strict=True)) if a != b)
    assert plain[first] in plain[:first], "only what was generated before is penalised"
    assert len(set(penalised)) > len(set(plain))


def test_an_engine_works_after_reset(model):
    engine, request = Engine(model, slots=2), Request([1, 2, 3], 9, GREEDY)
    for _ in range(3):
        engine.submit(request)
    engine.step()
    engine.reset()
    assert not engine.busy
    assert engine.active == 0
    assert engine.completions([request]) == Engine(model).completions([request])
