"""LangChain's ChatOpenAI, unmodified."""

import asyncio

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

TALK = [
    SystemMessage("Be brief."),
    HumanMessage("Hello"),
    AIMessage("Hi"),
    HumanMessage("Who are you?"),
]


@pytest.fixture
def model(server):
    return ChatOpenAI(
        model="base",
        base_url=f"{server.url}/v1",
        api_key="any",
        max_tokens=20,
        seed=1,
        temperature=0.7,
        max_retries=0,
    )


@pytest.fixture
def answer(server):
    """What the server answers to TALK without LangChain."""
    roles = {"human": "user", "ai": "assistant", "system": "system"}
    talk = [{"role": roles[m.type], "content": m.content} for m in TALK]
    body = {"messages": talk, "max_tokens": 20, "seed": 1, "temperature": 0.7}
    return server.call("/v1/chat/completions", body).body


def test_invoke(model, answer):
    said = model.invoke(TALK)
    assert said.content == answer["choices"][0]["message"]["content"]
    assert said.response_metadata["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert said.usage_metadata["input_tokens"] == answer["usage"]["prompt_tokens"]
    assert said.usage_metadata["output_tokens"] == answer["usage"]["completion_tokens"]


def test_stream(model, answer):
    chunks = list(model.stream(TALK, stream_usage=True))
    assert len(chunks) > 3
    whole = sum(chunks[1:], start=chunks[0])
    assert whole.content == answer["choices"][0]["message"]["content"]
    assert whole.response_metadata["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert whole.usage_metadata["total_tokens"] == answer["usage"]["total_tokens"]


def test_async(model, answer):
    async def main():
        chunks = [chunk.content async for chunk in model.astream(TALK)]
        return (await model.ainvoke(TALK)).content, "".join(chunks)

    content = answer["choices"][0]["message"]["content"]
    assert asyncio.run(main()) == (content, content)


def test_batch(model):
    questions = [f"What is {i}?" for i in range(12)]
    answers = model.batch(questions)
    alone = [model.invoke(question).content for question in questions]
    assert [said.content for said in answers] == alone


def test_log_probs_and_stops(model, answer):
    whole = answer["choices"][0]["message"]["content"]
    said = model.bind(logprobs=True, top_logprobs=2).invoke(TALK)
    assert len(said.response_metadata["logprobs"]["content"]) == 20
    assert model.bind(stop=[whole[5:7]]).invoke(TALK).content == whole[: whole.index(whole[5:7])]


def test_errors(model):
    with pytest.raises(openai.BadRequestError):
        model.bind(max_tokens=100_000).invoke(TALK)
