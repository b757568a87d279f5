"""The worker thread: admission, cancellation, failures, shutdown."""

import asyncio
import math
import time
from dataclasses import replace

import pytest
import torch
from servers import HANGS_S
from tiny_models import tiny

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import NumbersError
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.serve.api.responses import collect
from openpalm.serve.worker import EngineFailed, Overloaded, ServedModel, ShuttingDown, Worker

LONG = Request([1, 2, 3], 50, Sampling(seed=1))


class Watched(Engine):
    """Counts its steps, takes 5 ms for each, and fails at step `fails_at`."""

    steps = 0
    fails_at: int | None = None

    def step(self):
        self.steps += 1
        time.sleep(0.005)
        if self.steps == self.fails_at:
            raise RuntimeError("out of memory")
        return super().step()


def run(test, *, slots=4, max_queue=8, model=None):
    """Runs `test(worker, engine)` on an event loop, with the worker started and stopped."""

    async def body():
        engine = Watched(model or tiny(), slots=slots)
        worker = Worker(ServedModel("tiny", engine, Tokenizer.byte(), "-"), max_queue=max_queue)
        worker.start()
        try:
            await asyncio.wait_for(test(worker, engine), HANGS_S)
        finally:
            worker.stop()

    asyncio.run(body())


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_closing_a_stream_frees_the_slots_within_two_steps():
    async def test(worker, engine):
        answers = worker.submit(worker.current, [LONG] * 3)
        async for _ in answers:
            break
        at = engine.steps
        answers.close()
        await until(lambda: worker.in_flight == 0)
        assert engine.steps <= at + 2
        assert engine.active == 0
        steps = engine.steps
        await asyncio.sleep(0.05)
        assert engine.steps == steps, "an idle engine rests"

    run(test)


def test_the_queue_is_bounded_and_empties():
    async def test(worker, engine):
        answers = [worker.submit(worker.current, [LONG] * 4) for _ in range(3)]
        with pytest.raises(Overloaded):
            worker.submit(worker.current, [LONG])
        said = await asyncio.gather(*(collect(answer) for answer in answers))
        assert {one.finish for group in said for one in group} == {"length"}
        assert worker.in_flight == 0
        await collect(worker.submit(worker.current, [LONG] * 12))

    run(test)


def test_without_a_queue_a_request_has_a_slot_or_is_refused():
    async def test(worker, engine):
        answer = worker.submit(worker.current, [LONG])
        with pytest.raises(Overloaded):
            worker.submit(worker.current, [LONG])
        await collect(answer)
        await collect(worker.submit(worker.current, [LONG]))

    run(test, slots=1, max_queue=0)


def test_after_an_engine_error_new_requests_succeed(capfd):
    async def test(worker, engine):
        engine.fails_at = 5
        answers = worker.submit(worker.current, [LONG] * 6)
        with pytest.raises(EngineFailed, match="RuntimeError: out of memory"):
            await collect(answers)
        await until(lambda: worker.in_flight == 0)
        again = await collect(worker.submit(worker.current, [LONG]))
        assert again[0].tokens[0][0].id == Engine(tiny()).completions([LONG])[0][0]
        assert engine.active == 0

    run(test)
    assert "out of memory" in capfd.readouterr().err


class Panic(BaseException):
    """As a library in Rust raises it: not an Exception."""


class Fussy(Tokenizer):
    """Panics at the bytes of one token."""

    refused = -1

    @property
    def token_bytes(self):
        return _Fussily(super().token_bytes, self.refused)


class _Fussily(list):
    def __init__(self, table, refused):
        super().__init__(table)
        self.refused = refused

    def __getitem__(self, index):
        if index == self.refused:
            raise Panic("not this one")
        return super().__getitem__(index)


def test_a_tokenizer_panic_ends_one_request_only(capfd):
    async def test(worker, engine):
        other = replace(LONG, sampling=Sampling(seed=2))
        first, second = (Engine(tiny()).completions([asked])[0] for asked in (LONG, other))
        tokenizer = Fussy.byte()
        tokenizer.refused = next(i for i in first if i not in second)
        served = ServedModel("tiny", engine, tokenizer, "-")
        fails, goes = (worker.submit(served, [asked]) for asked in (LONG, other))
        with pytest.raises(EngineFailed, match="Panic: not this one"):
            await collect(fails)
        said = await collect(goes)
        assert [token.id for token, _ in said[0].tokens] == second
        await until(lambda: worker.in_flight == 0)

    run(test)
    assert capfd.readouterr().err.count("Traceback") == 1


def test_an_engine_panic_does_not_end_the_thread(capfd):
    async def test(worker, engine):
        def panic(request):
            raise Panic("at once")

        engine.submit, kept = panic, engine.submit
        with pytest.raises(EngineFailed, match="Panic: at once"):
            await collect(worker.submit(worker.current, [LONG] * 2))
        engine.submit = kept
        await collect(worker.submit(worker.current, [LONG]))
        assert worker.in_flight == 0

    run(test)
    assert "at once" in capfd.readouterr().err


def test_nan_log_probs_end_one_request_only():
    async def test(worker, engine):
        step = engine.step

        def spoilt():
            nan = float("nan")
            return [replace(t, log_prob=nan) if t.request == 0 else t for t in step()]

        engine.step = spoilt
        answers = [worker.submit(worker.current, [LONG]) for _ in range(2)]
        with pytest.raises(NumbersError, match="not finite"):
            await collect(answers[0])
        said = await collect(answers[1])
        assert len(said[0].tokens) == 50
        await until(lambda: worker.in_flight == 0)
        assert engine.active == 0

    run(test)


def test_empty_requests_finish_without_a_step():
    async def test(worker, engine):
        nothing = [Request([1, 2], 0), Request([1], 0, score_prompt=True)]
        said = await collect(worker.submit(worker.current, nothing))
        assert [one.finish for one in said] == ["length"] * 2
        assert (worker.in_flight, engine.steps) == (0, 0)

    run(test)


def test_shutdown_refuses_new_requests_and_ends_the_others():
    async def test(worker, engine):
        answers = worker.submit(worker.current, [LONG] * 2)
        worker.shut_down(0)
        with pytest.raises(ShuttingDown):
            worker.submit(worker.current, [LONG])
        with pytest.raises(ShuttingDown):
            await collect(answers)
        await until(lambda: worker.in_flight == 0)

    run(test)


def test_a_replaced_model_is_dropped_after_its_last_request():
    async def test(worker, engine):
        old = worker.submit(worker.current, [LONG])
        worker.current = ServedModel("new", Watched(tiny(seed=1)), Tokenizer.byte(), "-")
        new = worker.submit(worker.current, [LONG])
        first, second = await asyncio.gather(collect(old), collect(new))
        assert [t.id for t, _ in first[0].tokens] == Engine(tiny()).completions([LONG])[0]
        assert [t.id for t, _ in second[0].tokens] == Engine(tiny(seed=1)).completions([LONG])[0]
        assert not worker._unfinished

    run(test)


def test_numbers_that_are_not_finite_end_one_request_only():
    async def test(worker, engine):
        with torch.no_grad():
            engine.model.embedding[7] = math.nan
        hit = worker.submit(worker.current, [Request([1, 7], 5, Sampling(seed=1))])
        healthy = worker.submit(worker.current, [LONG])
        with pytest.raises(NumbersError):
            await collect(hit)
        assert (await collect(healthy))[0].finish == "length"
        await until(lambda: worker.in_flight == 0)

    run(test, model=tiny(tied=False))
