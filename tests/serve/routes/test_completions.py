"""`/v1/completions` returns the engine's completions in OpenAI's shape."""

import itertools
import math

import pytest
from servers import events

from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling, completion_seed
from openpalm.generate.streaming import Completion, stream

GREEDY = {"temperature": 0, "max_tokens": 20}


def direct(engine, tokenizer, prompt, *, stops=(), new=20, **how):
    """The same answer from the engine itself."""
    how = {"temperature": 0.8} | how
    request = Request(
        tokenizer.encode(prompt), new, Sampling(**how), frozenset({tokenizer.end_of_text})
    )
    answer = Completion("", [], "")
    for _ in stream(engine, tokenizer, request, stops, answer):
        pass
    return answer


def ask(call, **body):
    answer = call("/v1/completions", body)
    assert answer.status == 200, answer.body
    return answer.body


def streamed(call, **body):
    answer = call("/v1/completions", body | {"stream": True})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.body)
    assert found.pop() == "[DONE]"
    return found


def joined(chunks, index=0):
    """Text and finish of a streamed choice; it ends exactly once, with its last part."""
    parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    assert [p["finish_reason"] for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["finish_reason"] is not None
    return "".join(part["text"] for part in parts), parts[-1]["finish_reason"]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0},
        {"temperature": 0.7, "seed": 5},
        {"temperature": 2, "seed": -1, "top_p": 0.5},
        {"seed": 3, "top_k": 4},
        {"seed": 3, "min_p": 0.2},
        {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": 1.5},
    ],
)
def test_the_completion_is_the_engines(call, engine, tokenizer, how):
    body = ask(call, prompt="The quick", max_tokens=20, **how)
    (choice,) = body["choices"]
    expected = direct(engine, tokenizer, "The quick", **how)
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish
    assert body["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": len(expected.tokens),
        "total_tokens": 9 + len(expected.tokens),
    }


def test_default_settings(call, engine, tokenizer):
    """16 tokens, the temperature of `openpalm sample`; null is the same as not given."""
    nothing = dict.fromkeys(["temperature", "top_p", "max_tokens", "n", "stop", "logit_bias"])
    body = ask(call, prompt="abc", seed=7, **nothing)
    expected = direct(engine, tokenizer, "abc", new=16, seed=7)
    assert body["choices"][0]["text"] == expected.text


def test_without_a_seed_completions_differ(call):
    texts = {ask(call, prompt="abc", temperature=2)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("prompt", [["ab", "c"], [[97, 98], [99]]])
def test_several_prompts_and_choices_come_in_order(call, engine, tokenizer, prompt):
    body = ask(call, prompt=prompt, n=2, seed=4, max_tokens=20)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    expected = [
        direct(engine, tokenizer, text, seed=seed).text
        for text, seed in itertools.product(["ab", "c"], [4, completion_seed(4, 1)])
    ]
    assert [choice["text"] for choice in body["choices"]] == expected
    assert body["usage"]["prompt_tokens"] == 3


def test_neighbouring_seeds_share_no_completion(call):
    def texts(seed):
        body = ask(call, prompt="ab", n=8, seed=seed, temperature=2, max_tokens=20)
        return {choice["text"] for choice in body["choices"]}

    seen = [texts(seed) for seed in (4, 5, 6)]
    assert len(set.union(*seen)) == 24


def test_one_prompt_as_ids(call):
    by_ids = ask(call, prompt=[97, 98], **GREEDY)["choices"]
    assert by_ids == ask(call, prompt="ab", **GREEDY)["choices"]


def test_the_empty_prompt_starts_a_document(call, tokenizer):
    empty = ask(call, prompt="", **GREEDY)["choices"]
    assert empty == ask(call, prompt=[tokenizer.end_of_text], **GREEDY)["choices"]


# --- stops, biases


def test_stop_strings(call, engine, tokenizer):
    whole = direct(engine, tokenizer, "The quick", seed=1).text
    stop = whole[6:8]
    for stops in (stop, [stop, "never"], ["", stop]):
        (choice,) = ask(call, prompt="The quick", seed=1, max_tokens=20, stop=stops)["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_logit_bias_forces_and_forbids(call):
    forced = ask(call, prompt="a", logit_bias={"66": 100}, max_tokens=5, seed=1)
    assert forced["choices"][0]["text"] == "BBBBB"
    best = ask(call, prompt="a", **GREEDY, logprobs=1)["choices"][0]["logprobs"]["tokens"][0]
    without = ask(call, prompt="a", **GREEDY, logit_bias={str(ord(best)): -100})
    assert not without["choices"][0]["text"].startswith(best)


def test_ignore_eos_continues(call, tokenizer):
    bias = {str(tokenizer.end_of_text): 100}
    (ended,) = ask(call, prompt="a", logit_bias=bias, max_tokens=5)["choices"]
    (longer,) = ask(call, prompt="a", logit_bias=bias, max_tokens=5, ignore_eos=True)["choices"]
    assert (ended["finish_reason"], longer["finish_reason"]) == ("stop", "length")


# --- log-probabilities, echo


def test_echoed_log_probs_are_the_engines_score(call, engine):
    """As lm-evaluation-harness asks: the prompt's tokens, and one more."""
    prompts = [[70, 71, 72, 73, 90], list(range(60, 100)), [5]]
    body = ask(call, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    for choice, prompt in zip(body["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        score = engine.score([prompt])[0].tolist()
        assert found["token_logprobs"][1:-1] == pytest.approx(score, abs=1e-4)
        assert choice["text"].startswith("".join(map(chr, prompt)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_generating(call, engine, stream):
    """As HELM asks: max_tokens 0, echo, logprobs. A single token has no score."""
    prompts = [list(range(60, 100)), [5], list(range(128))]  # the last fills the context
    asked = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "n": 2}
    if stream:
        chunks = streamed(call, **asked)
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        assert sorted(p["index"] for p in parts if p["finish_reason"]) == list(range(6))
        choices = {p["index"]: p for p in parts if p["logprobs"]}
    else:
        body = ask(call, **asked)
        assert body["usage"]["completion_tokens"] == 0
        choices = {choice["index"]: choice for choice in body["choices"]}
        assert {choice["finish_reason"] for choice in choices.values()} == {"length"}
    assert sorted(choices) == list(range(6))
    for index, choice in choices.items():
        prompt = prompts[index // 2]
        score = engine.score([prompt])[0].tolist()
        first, *scored = choice["logprobs"]["token_logprobs"]
        assert first is None
        assert scored == pytest.approx(score, abs=1e-4)
        assert choice["text"] == "".join(map(chr, prompt))


def test_an_echo_without_new_tokens_needs_no_model(call):
    (choice,) = ask(call, prompt="abc", max_tokens=0, echo=True)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert call("/v1/completions", {"prompt": "abc", "max_tokens": 0}).status == 400


def test_max_completion_tokens(call):
    assert ask(call, prompt="a", max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    both = {"prompt": "a", "max_tokens": 3, "max_completion_tokens": 4}
    assert call("/v1/completions", both).body["error"]["param"] == "max_completion_tokens"


def test_log_prob_offsets_match_the_text(call):
    for echo, prompt in itertools.product([False, True], ["The quick", "né", ""]):
        (choice,) = ask(call, prompt=prompt, logprobs=3, echo=echo, seed=1)["choices"]
        found = choice["logprobs"]
        lengths = {len(values) for values in found.values()}
        assert len(lengths) == 1
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            if not token.startswith(("bytes:", "<|")):
                assert choice["text"][offset:].startswith(token)
        offsets = found["text_offset"]
        assert offsets == sorted(offsets)


def test_the_likeliest_tokens_come_with_each(call):
    (choice,) = ask(call, prompt="abc", logprobs=5, seed=2)["choices"]
    found = choice["logprobs"]
    for token, log_prob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == pytest.approx(log_prob)
        assert 5 <= len(top) <= 6
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5
        assert max(top.values()) >= log_prob


def test_logprobs_0_has_no_top_tokens(call):
    (choice,) = ask(call, prompt="abc", logprobs=0, seed=2)["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == 16


# --- streams


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "The quick", "seed": 1},
        {"prompt": "The quick", "temperature": 0, "echo": True, "logprobs": 2},
        {"prompt": ["ab", "né"], "n": 3, "seed": 8, "max_tokens": 30},
        {"prompt": "abc", "seed": 4, "stop": ["e", "\n"], "logprobs": 1, "max_tokens": 60},
    ],
)
def test_a_stream_joined_is_the_whole(call, body):
    whole = ask(call, **body)["choices"]
    chunks = streamed(call, **body)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole:
        index = choice["index"]
        assert joined(chunks, index) == (choice["text"], choice["finish_reason"])
        if choice["logprobs"]:
            parts = [c["logprobs"] for k in chunks for c in k["choices"] if c["index"] == index]
            tokens = [token for part in parts if part for token in part["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


def test_usage_comes_last_if_requested(call):
    body = {"prompt": "abc", "seed": 1}
    *chunks, last = streamed(call, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"] == ask(call, **body)["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert all("usage" not in chunk for chunk in streamed(call, **body))
    refused = call("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert (refused.status, refused.body["error"]["param"]) == (400, "stream_options")
