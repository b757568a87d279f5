"""The engine's thread: cancelling, breaking, and what it does in between."""

import asyncio
import math
import time

import pytest
import torch
from tiny_models import tiny

from openpalm.data.tokenizer import Tokenizer
from openpalm.errors import NumbersError
from openpalm.generate.engine import Engine, Request
from openpalm.generate.sampling import Sampling
from openpalm.serve.answering import collect
from openpalm.serve.worker import Draining, EngineFailed, Overloaded, Served, Worker

LONG = Request([1, 2, 3], 50, Sampling(seed=1))


class Watched(Engine):
    """Counts its steps, slow enough to be watched; breaks at one where it is told to."""

    steps = 0
    breaks_at: int | None = None

    def step(self):
        self.steps += 1
        time.sleep(0.005)
        if self.steps == self.breaks_at:
            raise RuntimeError("out of memory")
        return super().step()


def run(test, *, slots=4, queue_limit=8, model=None):
    """Runs `test(worker, engine)` on an event loop, with the worker started and stopped."""

    async def body():
        engine = Watched(model or tiny(), slots=slots)
        worker = Worker(Served("tiny", engine, Tokenizer.byte(), "-"), queue_limit=queue_limit)
        worker.start()
        try:
            await asyncio.wait_for(test(worker, engine), 30)
        finally:
            worker.stop()

    asyncio.run(body())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_who_leaves_frees_the_slots_within_two_steps():
    async def test(worker, engine):
        answers = worker.submit(worker.current, [LONG] * 3)
        async for _ in answers:
            break
        at = engine.steps
        answers.close()
        await until(lambda: worker.load == 0)
        assert engine.steps <= at + 2
        assert engine.active == 0
        steps = engine.steps
        await asyncio.sleep(0.05)
        assert engine.steps == steps, "an idle engine rests"

    run(test)


def test_what_waits_is_bounded_and_comes_back():
    async def test(worker, engine):
        answers = [worker.submit(worker.current, [LONG] * 4) for _ in range(3)]
        with pytest.raises(Overloaded):
            worker.submit(worker.current, [LONG])
        said = await asyncio.gather(*(collect(answer) for answer in answers))
        assert {one.finish for group in said for one in group} == {"length"}
        assert worker.load == 0
        await collect(worker.submit(worker.current, [LONG] * 12))

    run(test)


def test_an_engine_that_breaks_loses_its_requests_and_goes_on(capfd):
    async def test(worker, engine):
        engine.breaks_at = 5
        answers = worker.submit(worker.current, [LONG] * 6)
        with pytest.raises(EngineFailed, match="RuntimeError: out of memory"):
            await collect(answers)
        await until(lambda: worker.load == 0)
        again = await collect(worker.submit(worker.current, [LONG]))
        assert again[0].tokens[0][0].id == Engine(tiny()).answers([LONG])[0][0]
        assert engine.active == 0

    run(test)
    assert "out of memory" in capfd.readouterr().err


def test_a_drain_takes_nothing_new_and_ends_what_does_not_end():
    async def test(worker, engine):
        answers = worker.submit(worker.current, [LONG] * 2)
        worker.drain(0)
        with pytest.raises(Draining):
            worker.submit(worker.current, [LONG])
        with pytest.raises(Draining):
            await collect(answers)
        await until(lambda: worker.load == 0)

    run(test)


def test_an_old_model_is_dropped_when_its_last_request_ends():
    async def test(worker, engine):
        old = worker.submit(worker.current, [LONG])
        worker.current = Served("new", Watched(tiny(seed=1)), Tokenizer.byte(), "-")
        new = worker.submit(worker.current, [LONG])
        first, second = await asyncio.gather(collect(old), collect(new))
        assert [t.id for t, _ in first[0].tokens] == Engine(tiny()).answers([LONG])[0]
        assert [t.id for t, _ in second[0].tokens] == Engine(tiny(seed=1)).answers([LONG])[0]
        assert not worker._running

    run(test)


def test_numbers_that_are_not_finite_end_one_request_alone():
    async def test(worker, engine):
        with torch.no_grad():
            engine.model.embedding[7] = math.nan
        hit = worker.submit(worker.current, [Request([1, 7], 5, Sampling(seed=1))])
        healthy = worker.submit(worker.current, [LONG])
        with pytest.raises(NumbersError):
            await collect(hit)
        assert (await collect(healthy))[0].finish == "length"
        await until(lambda: worker.load == 0)

    run(test, model=tiny(tied=False))
