"""pydantic validates what the server sends against the declared response models."""

import pytest
from pydantic import TypeAdapter
from servers import events

from openpalm.serve.api import response_models

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "n": 2}
LOG_PROBS = {"logprobs": True, "top_logprobs": 2}
COMPLETION = {"prompt": ["ab", "c"], "max_tokens": 3}
ECHO = {"logprobs": 2, "echo": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def check(model, body):
    """`body` has exactly the fields of `model`, with values of their types."""
    assert TypeAdapter(model).validate_python(body, strict=True) == body


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", COMPLETION, response_models.Completion),
        ("/v1/completions", COMPLETION | {"logprobs": 0}, response_models.Completion),
        ("/v1/completions", COMPLETION | ECHO, response_models.Completion),
        ("/v1/chat/completions", CHAT, response_models.ChatCompletion),
        ("/v1/chat/completions", CHAT | LOG_PROBS, response_models.ChatCompletion),
        ("/v1/models", None, response_models.Models),
        ("/v1/models/base", None, response_models.Model),
        ("/tokenize", {"prompt": "abc"}, response_models.Tokenized),
        ("/detokenize", {"tokens": [70]}, response_models.Detokenized),
        ("/tokenizer_info", None, response_models.TokenizerInfo),
        ("/complete", {"context": "abc"}, response_models.LegacyCompletion),
        ("/v1/completions", {}, response_models.Error),
    ],
)
def test_bodies_are_as_declared(call, path, body, model):
    check(model, call(path, body).body)


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", COMPLETION, response_models.CompletionChunk),
        ("/v1/completions", COMPLETION | ECHO | USAGE, response_models.CompletionChunk),
        ("/v1/chat/completions", CHAT, response_models.ChatCompletionChunk),
        ("/v1/chat/completions", CHAT | LOG_PROBS | USAGE, response_models.ChatCompletionChunk),
    ],
)
def test_chunks_are_as_declared(call, path, body, model):
    *chunks, done = events(call(path, body | {"stream": True}).body)
    assert done == "[DONE]"
    assert chunks
    for chunk in chunks:
        check(model, chunk)


def test_chunks_are_documented(call):
    schema = call("/openapi.json").body
    for path, name in (
        ("/v1/completions", "CompletionChunk"),
        ("/v1/chat/completions", "ChatCompletionChunk"),
    ):
        content = schema["paths"][path]["post"]["responses"]["200"]["content"]
        assert f"#/components/schemas/{name}" in str(content["text/event-stream"])
        assert name in schema["components"]["schemas"]
