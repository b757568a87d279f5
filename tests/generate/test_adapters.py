"""Requests with different adapters in one batch: each as an engine with that adapter alone."""

import random
import weakref

import pytest
import torch
from adapters import ALL, CONFIGS, adapted
from tiny_models import tiny

from openpalm.generate.adapters import LowRank, pack, repeated
from openpalm.generate.engine import Engine
from openpalm.generate.quantize import WeightFormat
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.model import lora
from openpalm.model.config import LORA_TARGETS, LoraConfig

GREEDY = Sampling(temperature=0)


def packed(engine: Engine, model):
    config = lora.config_of(model)
    assert config is not None
    return pack(engine.model, config, lora.adapter_parameters(model))


def log_probs(engine: Engine, requests):
    """(id, log-probability) of every generated token, by request."""
    found = [[] for _ in requests]
    for token in engine.generate(requests):
        found[token.request].append((token.id, token.log_prob))
    return found


def test_each_row_equals_an_engine_with_its_adapter_alone(any_model):
    engine = Engine(any_model)
    models = [any_model, *(adapted(config, i, any_model) for i, config in enumerate(CONFIGS))]
    adapters = [None, *(packed(engine, model) for model in models[1:])]
    prompts = [list(range(i, i + 9 + i)) for i in range(5)]
    expected = [
        Engine(model, slots=1).completions([Request(prompt, 12, GREEDY) for prompt in prompts])
        for model in models
    ]
    assert all(expected.count(each) == 1 for each in expected)
    requests = [Request(prompt, 12, GREEDY, adapter=a) for a in adapters for prompt in prompts]
    assert engine.completions(requests) == [ids for each in expected for ids in each]


def test_rows_without_an_adapter_equal_the_base_bit_for_bit():
    engine = Engine(tiny(), slots=6)
    adapters = [packed(engine, adapted(config, i, tiny())) for i, config in enumerate(CONFIGS)]
    prompts = [[5 * i + j for j in range(20)] for i in range(3)]
    plain = [Request(prompt, 20, GREEDY) for prompt in prompts]
    alone = [log_probs(Engine(tiny(), slots=1), [request])[0] for request in plain]
    mixed = [*plain, *(Request(prompts[0], 20, GREEDY, adapter=a) for a in adapters)]
    random.Random(0).shuffle(mixed)
    found = dict(zip(map(id, mixed), log_probs(engine, mixed), strict=True))
    assert [found[id(request)] for request in plain] == alone
    assert all(found[id(request)] not in alone for request in mixed if request.adapter)


def test_a_row_with_an_adapter_does_not_depend_on_the_others():
    """256 requests at random times: each has the tokens that it has alone."""
    draw, model = random.Random(1), tiny()
    engine = Engine(model, slots=5)
    adapters = [None, *(packed(engine, adapted(c, i, tiny())) for i, c in enumerate(CONFIGS))]
    requests, found = {}, {}
    while len(requests) < 256 or engine.busy:
        for _ in range(draw.randrange(4) if len(requests) < 256 else 0):
            prompt = [draw.randrange(200)] * draw.randrange(1, 3)
            request = Request(prompt, draw.randrange(1, 9), adapter=draw.choice(adapters))
            requests[engine.submit(request)] = request
        for token in engine.step():
            found.setdefault(token.request, []).append(token.id)
    alone = Engine(model, slots=1)
    for ticket, request in requests.items():
        assert found[ticket] == alone.completions([request])[0]


@pytest.mark.parametrize("columns", [32, 96, 768])
def test_the_bits_of_an_update_do_not_depend_on_the_number_of_rows(columns):
    generator = torch.Generator().manual_seed(0)
    a, b, x = (
        torch.randn(shape, generator=generator) for shape in ((9, columns), (40, 3), (70, columns))
    )
    update = LowRank(a, [b, torch.empty(5, 0), b[:7], b])
    whole = update(x[:, None], 70)[:, 0]
    exact = a.double() @ x.double().T
    parts = (b.double() @ exact[:3], torch.zeros(5, 70), b[:7].double() @ exact[3:6])
    torch.testing.assert_close(
        whole[:, :52].double(), torch.cat(parts).T.double(), rtol=1e-5, atol=1e-3
    )
    for rows in (1, 2, 3, 8, 16, 33):
        sources = torch.tensor(repeated([*range(rows)], 1))
        assert torch.equal(update(x[sources, None], rows)[:, 0], whole[:rows])
    assert torch.equal(update(x[None], 1)[0], whole)


def test_prefixes_are_shared_within_an_adapter_and_never_between_two():
    engine, prompt = Engine(tiny(), slots=8), list(range(40))
    models = [adapted(ALL, 0, tiny()), adapted(ALL, 1, tiny())]
    adapters = [None, *(packed(engine, model) for model in models)]
    # Together, so that prompts in prefill are found too; then again, so that finished ones are.
    for again in range(2):
        requests = [Request(prompt, 5, GREEDY, adapter=a) for a in adapters for _ in range(2)]
        expected = [Engine(m).completions([Request(prompt, 5, GREEDY)])[0] for m in models]
        found = engine.completions(requests)
        assert found[2:] == [expected[0]] * 2 + [expected[1]] * 2
        assert engine.prefilled_tokens == 3 * len(prompt) + 3 + again * 6


def test_another_adapter_of_the_same_name_finds_no_prefix_of_the_first():
    """The cache knows adapters by serial number, and keeps none of them alive."""
    engine, prompt = Engine(tiny(), slots=2), list(range(40))
    first = packed(engine, adapted(ALL, 0, tiny()))
    engine.completions([Request(prompt, 5, GREEDY, adapter=first)])
    gone = weakref.ref(first)
    del first
    engine.completions([Request([1], 1, GREEDY)])  # the routing forgets it too
    assert gone() is None
    second = adapted(ALL, 1, tiny())
    request = Request(prompt, 5, GREEDY, adapter=packed(engine, second))
    expected = Engine(second).completions([Request(prompt, 5, GREEDY)])
    assert engine.completions([request]) == expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_an_adapter_over_quantized_weights(weights: WeightFormat):
    """As near to the float32 model with the adapter as the base is to the float32 base."""
    model = adapted(LoraConfig(4, 4.0, LORA_TARGETS), 0, tiny())
    sequences = [list(range(i, i + 40)) for i in range(8)]

    def score(engine, adapter=None):
        requests = [Request(ids, 0, score_prompt=True, adapter=adapter) for ids in sequences]
        return torch.tensor([[p for _, p in row] for row in log_probs(engine, requests)])

    def off(a, b):
        return float((a - b).abs().mean())

    exact, exact_base = score(Engine(model)), score(Engine(tiny()))
    engine = Engine(tiny(), weights=weights)
    adapter = packed(engine, model)
    plain = score(Engine(tiny(), weights=weights))
    assert torch.equal(score(engine), plain)
    assert off(score(engine, adapter), exact) < 1.5 * off(plain, exact_base)
    assert off(exact, exact_base) > 3 * off(plain, exact_base)


def test_scores_with_an_adapter():
    model = adapted(ALL, 0, tiny())
    engine, ids = Engine(tiny()), list(range(30))
    request = Request(ids, 0, score_prompt=True, adapter=packed(engine, model))
    expected = Engine(model).score([ids])[0]
    found = torch.tensor([token.log_prob for token in engine.generate([request])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_engine_over_another_engine_s_model_has_its_own_adapters():
    one = Engine(tiny())
    other = Engine(one.model, owned=True)
    adapter = packed(one, adapted(ALL, 0, tiny()))
    plain, request = Request([1, 2], 8, GREEDY), Request([1, 2], 8, GREEDY, adapter=adapter)
    expected = one.completions([plain, request])
    one.submit(request)
    one.step()
    assert other.completions([plain]) == expected[:1]
    assert other.completions([request]) == expected[1:]


def test_an_adapter_of_another_model_is_our_mistake():
    engine = Engine(tiny())
    adapter = packed(Engine(tiny(depth=1)), adapted(ALL, 0, tiny(depth=1)))
    with pytest.raises(AssertionError, match="another model"):
        engine.submit(Request([1], 1, adapter=adapter))
