"""The `openai` client, unmodified."""

import asyncio
import math
from contextlib import closing

import openai
import pytest
from command_line import write_base
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from servers import serving

TALK = [{"role": "user", "content": "Who are you?"}]
# Nothing beyond ASCII, so that every token is a character.
ASCII = {str(i): -100 for i in range(128, 265)}
USAGE = {"include_usage": True}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory):
    """One slot, no queue, a key, and a context that takes seconds to fill."""
    base = write_base(tmp_path_factory.mktemp("narrow") / "base", context=8192)
    options = ["--dtype", "float32", "--max-sequences", 1, "--max-queue", 0]
    with serving(base, *options, env={"OPENPALM_API_KEY": "secret"}) as running:
        yield running


@pytest.fixture
def narrow(narrow_server):
    url = f"{narrow_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        yield client
    narrow_server.wait_idle()


def complete(client, **how):
    how = {"model": "base", "prompt": "The quick", "max_tokens": 30, "seed": 1} | how
    return client.completions.create(**how)


def chat(client, **how):
    how = {"model": "base", "messages": TALK, "max_tokens": 30, "seed": 1} | how
    return client.chat.completions.create(**how)


def text_of(choice):
    """The text of a choice or of a part of one, in either API."""
    if hasattr(choice, "text"):
        return choice.text
    said = getattr(choice, "message", None) or choice.delta
    return said.content or ""


def texts(answer):
    return [text_of(choice) for choice in answer.choices]


def joined(chunks):
    """Text and finish of every streamed choice, by index; each ends once, with its last part."""
    parts = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        parts.setdefault(choice.index, []).append(choice)
    for of_one in parts.values():
        assert [p.finish_reason is None for p in of_one] == [True] * (len(of_one) - 1) + [False]
    return {
        index: ("".join(map(text_of, of_one)), of_one[-1].finish_reason)
        for index, of_one in sorted(parts.items())
    }


both = pytest.mark.parametrize("ask", [complete, chat])


# --- models, answers


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "base"
    assert client.models.retrieve("base") == model


def test_responses_have_the_clients_types(client):
    """The client itself does not check: what is missing is None, whatever the type."""
    for answer in (complete(client), complete(client, logprobs=2)):
        Completion.model_validate(answer.to_dict())
    for answer in (chat(client), chat(client, logprobs=True, top_logprobs=2)):
        ChatCompletion.model_validate(answer.to_dict())
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True, stream_options=USAGE)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.to_dict())


@both
def test_a_stream_joined_is_the_whole(client, ask):
    whole = ask(client, n=3)
    *chunks, last = ask(client, n=3, stream=True, stream_options=USAGE)
    expected = {c.index: (text_of(c), c.finish_reason) for c in whole.choices}
    assert joined(chunks) == expected
    assert len(expected) == 3
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {last.id}


def test_the_clients_own_way_to_collect_a_stream(client):
    """It takes only an answer that ended by itself."""
    how = {"logit_bias": ASCII, "stop": texts(chat(client, logit_bias=ASCII))[0][20:22]}
    talk = {"model": "base", "messages": TALK, "max_tokens": 30, "seed": 1}
    with client.chat.completions.stream(**talk, **how, stream_options=USAGE) as stream:
        kinds = {event.type for event in stream}
        collected = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    whole = chat(client, **how)
    assert texts(collected) == texts(whole) != [""]
    assert collected.usage == whole.usage


@both
def test_seeds(client, ask):
    assert texts(ask(client, seed=5)) == texts(ask(client, seed=5))
    assert len({texts(ask(client, seed=seed))[0] for seed in range(5)}) == 5
    assert len({texts(ask(client, seed=openai.omit))[0] for _ in range(5)}) > 1


@both
def test_the_async_client_gets_the_same(client, server, ask):
    async def main():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
            whole = await asyncio.gather(*(ask(client, seed=seed) for seed in range(16)))
            stream = await ask(client, seed=3, stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(main())
    assert list(map(texts, whole)) == [texts(ask(client, seed=seed)) for seed in range(16)]
    assert [text for text, _ in joined(chunks).values()] == texts(whole[3])


def test_several_prompts_as_text_or_ids(client):
    by_text = complete(client, prompt=["ab", "c"], n=2)
    by_ids = complete(client, prompt=[[97, 98], [99]], n=2)
    assert by_text.choices == by_ids.choices
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]


# --- log-probabilities, echo, stops, biases


def check_top(log_prob, top):
    """The five likeliest come first, and are probabilities of different things."""
    assert top[:5] == sorted(top[:5], reverse=True)
    assert sum(map(math.exp, top)) <= 1 + 1e-6
    assert log_prob <= top[0]


def test_log_probs_of_completions(client):
    (choice,) = complete(client, logprobs=5, logit_bias=ASCII).choices
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == list(range(30))
    for token, log_prob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == log_prob
        assert len(top) == 5 + (token not in list(top)[:5])
        check_top(log_prob, list(top.values()))


def test_log_probs_of_chat(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=5, logit_bias=ASCII).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == text_of(choice)
    for token in tokens:
        assert len(token.top_logprobs) == 5
        check_top(token.logprob, [other.logprob for other in token.top_logprobs])


@both
def test_streamed_log_probs_are_those_of_the_whole(client, ask):
    how = {"logprobs": 2} if ask is complete else {"logprobs": True, "top_logprobs": 2}
    name = "token_logprobs" if ask is complete else "content"
    (whole,) = ask(client, **how).choices
    parts = [choice for chunk in ask(client, stream=True, **how) for choice in chunk.choices]
    found = [value for p in parts if p.logprobs for value in getattr(p.logprobs, name)]
    assert found == getattr(whole.logprobs, name)


def test_echo(client):
    (choice,) = complete(client, echo=True, logprobs=1, logit_bias=ASCII).choices
    assert choice.text == "The quick" + texts(complete(client, logit_bias=ASCII))[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert [value is None for value in choice.logprobs.token_logprobs] == [True] + [False] * 38
    streamed = joined(complete(client, echo=True, stream=True, logit_bias=ASCII))
    assert streamed == {0: (choice.text, "length")}


@both
def test_stop_strings(client, ask):
    (whole,) = texts(ask(client, logit_bias=ASCII))
    stop = whole[10:12]
    before = whole[: whole.index(stop)]
    for stops in (stop, ["never there", stop]):
        answer = ask(client, stop=stops, logit_bias=ASCII)
        assert texts(answer) == [before]
        assert answer.choices[0].finish_reason == "stop"
        streamed = ask(client, stop=stops, logit_bias=ASCII, stream=True)
        assert joined(streamed) == {0: (before, "stop")}


@both
def test_logit_bias_forces_a_token(client, ask):
    assert texts(ask(client, max_tokens=5, logit_bias={"66": 100})) == ["BBBBB"]


# --- errors, load


@pytest.mark.parametrize(
    ("kind", "code", "how"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "another"}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 100_000}),
        (openai.BadRequestError, None, {"max_tokens": 0}),
        (openai.BadRequestError, None, {"temperature": 3}),
        (openai.BadRequestError, None, {"stop": ["a"] * 17}),
        (openai.BadRequestError, None, {"logit_bias": {"a": 1}}),
        (openai.BadRequestError, None, {"stream_options": USAGE}),
        (openai.BadRequestError, None, {"n": 9999}),
    ],
)
@both
def test_errors_are_raised(client, ask, kind, code, how):
    with pytest.raises(kind) as caught:
        ask(client, **how)
    assert caught.value.code == code
    assert caught.value.type in ("invalid_request_error", "not_found_error")


def test_no_such_model(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_keys(narrow):
    assert narrow.models.list().data
    for ask in (lambda c: c.models.list(), complete, chat):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(narrow.with_options(api_key="wrong"))
        assert caught.value.code == "invalid_api_key"


ENDLESS = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def begun(client, ask):
    """A stream that takes seconds, of which two parts have come."""
    stream = ask(client, stream=True, **ENDLESS)
    next(stream)
    next(stream)
    return stream


@both
def test_overload_raises_a_rate_limit_error_with_retry_after(narrow, ask):
    with closing(begun(narrow, ask)), pytest.raises(openai.RateLimitError) as caught:
        ask(narrow)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert caught.value.code == "overloaded"


@both
def test_a_disconnect_frees_the_slot(narrow, narrow_server, ask):
    finished = narrow_server.metric("openpalm_generated_tokens_total")
    stream = begun(narrow, ask)
    assert narrow_server.metric("openpalm_sequences_running") == 1
    stream.close()
    narrow_server.wait_idle()
    with pytest.raises(openai.APITimeoutError):
        ask(narrow.with_options(timeout=0.2), **ENDLESS)
    narrow_server.wait_idle()
    assert narrow_server.metric("openpalm_generated_tokens_total") == finished
    assert ask(narrow).usage.completion_tokens
