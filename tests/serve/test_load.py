"""Many requests at the same time: equal results, freed slots, refusals, no request lost."""

import asyncio
import json
import random
import re
import signal
from collections import Counter

import pytest
from servers import HANGS_S, call_async, serving

from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

COMPLETIONS = "/v1/completions"
ENDLESS = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "seed": 1, "stream": True}


async def together(url, bodies, **how):
    return await asyncio.gather(*(call_async(url, COMPLETIONS, body, **how) for body in bodies))


def test_256_concurrent_streams_equal_the_requests_alone(server, engine, tokenizer):
    """Greedy, in float32, prompts of different lengths, some with a common beginning."""
    draw = random.Random(0)
    prompts = [
        "The quick brown fox" * draw.randrange(2)
        + "".join(draw.choices("abcdefgh .", k=draw.randrange(1, 40)))
        for _ in range(256)
    ]
    bodies = [{"prompt": p, "temperature": 0, "max_tokens": 15, "stream": True} for p in prompts]
    answers = asyncio.run(together(server.url, bodies))
    assert Counter(answer.status for answer in answers) == {200: 256}
    for prompt, answer in zip(prompts, answers, strict=True):
        request = Request(tokenizer.encode(prompt), 15, Sampling(temperature=0), frozenset({256}))
        assert answer.text == tokenizer.decode(engine.completions([request])[0])
    server.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot_at_once(server, stream):
    """The sequences end long before the requested number of tokens."""
    server.wait_idle()
    before = server.metric("openpalm_generated_tokens_total")
    body = ENDLESS | {"stream": stream, "n": 4}
    asyncio.run(together(server.url, [body] * 5, leave_after=1 if stream else 0))
    server.wait_idle()
    assert server.metric("openpalm_generated_tokens_total") == before, "some were finished"


def test_1000_disconnects_leave_nothing_behind(server):
    draw = random.Random(1)

    async def leave(many):
        calls = [
            call_async(
                server.url,
                COMPLETIONS,
                ENDLESS | {"stream": draw.random() < 0.7},
                leave_after=draw.randrange(3),
            )
            for _ in range(many)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(10):
        asyncio.run(leave(100))
    server.wait_idle()
    whole = server.call(COMPLETIONS, {"prompt": "abc", "temperature": 0})
    assert whole.status == 200


def test_overload_is_refused_and_admitted_requests_are_answered(base):
    """Ten times the capacity: each request gets 429 or a whole response."""
    with serving(base, "--max-sequences", 2, "--max-queue", 6) as server:
        body = ENDLESS | {"stream": False}
        answers = asyncio.run(together(server.url, [body] * 80))
        statuses = Counter(answer.status for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 8
        server.wait_idle()
        refusals = [answer for answer in answers if answer.status == 429]
        assert {answer.headers["retry-after"] for answer in refusals} == {"1"}
        (said,) = {answer.body for answer in refusals}
        assert json.loads(said)["error"]["code"] == "overloaded"


async def status_of(url):
    """The status of a short request; None if the server refuses the connection."""
    try:
        return (await call_async(url, COMPLETIONS, ENDLESS | {"max_tokens": 1})).status
    except OSError:
        return None


def admitted_sequences(server):
    """The sequences that the server has taken so far: finished, running or waiting."""
    text = server.call("/metrics").body
    lines = re.findall(r"^openpalm_sequences(?:_in_flight|_total\{.*\}) (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in lines)


def test_sigterm_under_load_loses_nothing_in_flight(base):
    """All admitted requests are answered whole, new ones are refused, the exit status is 0."""
    # A busy machine may need longer than the default timeout for 4,800 tokens.
    with serving(base, "--max-sequences", 4, "--shutdown-timeout", HANGS_S) as server:

        async def load():
            bodies = [ENDLESS | {"stream": i % 2 == 0, "seed": i, "n": 4} for i in range(12)]
            calls = [asyncio.create_task(call_async(server.url, COMPLETIONS, b)) for b in bodies]
            while await asyncio.to_thread(admitted_sequences, server) < 12 * 4:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            while (late := await status_of(server.url)) == 200:
                pass
            assert not all(call.done() for call in calls), "nothing was in flight"
            return await asyncio.gather(*calls), late

        answers, late = asyncio.run(load())
        assert Counter(answer.status for answer in answers) == {200: 12}
        for answer in answers:
            assert answer.body.rstrip().endswith(("[DONE]", "}"))
            assert answer.body.count('"length"') == 4
        assert late in (None, 503)
        server.process.wait(timeout=HANGS_S)
        assert server.process.returncode == 0
        assert server.process.stderr.read() == ""


@pytest.mark.parametrize("signals", [1, 2])
def test_after_the_shutdown_timeout_requests_end_with_an_error(base, signals):
    """Also after a second signal."""
    timeout_s = 1 if signals == 1 else 60
    with serving(base, "--shutdown-timeout", timeout_s, "--max-sequences", 1) as server:

        async def load():
            bodies = [ENDLESS | {"stream": i % 2 == 0} for i in range(200)]
            calls = asyncio.create_task(together(server.url, bodies))
            while await asyncio.to_thread(server.metric, "openpalm_sequences_in_flight") < 150:
                assert not calls.done()
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
            return await calls

        answers = asyncio.run(load())
        assert server.process.wait(timeout=HANGS_S) == 0
        cut = [answer for answer in answers if "draining" in answer.body]
        assert len(cut) > 50
        assert {answer.status for answer in cut} == {200, 503}, "streams had begun"
        assert all(answer.status == 200 for answer in answers if answer not in cut)
        assert server.process.stderr.read() == ""
