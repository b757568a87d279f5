"""The thread that owns the engines: requests come from the event loop, pieces of text go back.

Bounded: what fits neither a slot nor the queue is refused at once. A model that is replaced
finishes what it began. Everything public here is called on the event loop, except where noted.
"""

import asyncio
import math
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import NumbersError, OpenPalmError
from openpalm.generate.defaults import SamplingDefaults
from openpalm.generate.engine import NOT_FINITE, Engine, Request, Token
from openpalm.generate.streaming import AnswerText, Piece

T = TypeVar("T")


def in_own_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread that ends with it: for loading models.

    OpenMP keeps workers for every living thread that has computed something. As soon as these are
    more than the machine has cores, all of them sleep between one loop and the next: one stream
    had 81 tokens/s instead of 105 (benchmarks/RESULTS.md). So only the engines' thread keeps them.
    """
    with ThreadPoolExecutor(max_workers=1) as once:
        return once.submit(work).result()


class Overloaded(Exception):
    """Slots and queue are full."""


class ShuttingDown(Exception):
    """The server is about to end and takes nothing new."""


def reason(error: BaseException) -> str:
    """An error in one short line."""
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class EngineFailed(Exception):
    """The engine broke off; its requests are lost, new ones may succeed."""


Broken = EngineFailed | ShuttingDown | OpenPalmError
"""Why a sequence ends without a finish."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that answers, under the name it has in the API."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    source: str
    """where it was loaded from"""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """how tokens are chosen where a request does not say"""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self.engine.model.config.context


@dataclass(eq=False)
class Job:
    """One sequence on its way."""

    index: int
    served: ServedModel
    request: Request
    text: AnswerText
    answers: "Answers"
    began: float = field(default_factory=time.perf_counter)
    prompt: list[Token] = field(default_factory=list)
    """the prompt's own tokens, where they are scored; complete with the first piece"""
    generated: int = 0
    """tokens so far"""
    first_s: float | None = None
    """seconds to the first token, once it came"""


class Answers:
    """The pieces of one call's sequences as they come; leaving early cancels the rest."""

    def __init__(self, worker: "Worker", served: ServedModel, requests: Sequence[Request]):
        self.served = served
        self.jobs: list[Job] = []
        self.pieces: asyncio.Queue[tuple[Job, Piece] | Broken] = asyncio.Queue()
        self._worker = worker
        self._requests = requests

    def start(self, stops: Sequence[str]) -> None:
        for index, request in enumerate(self._requests):
            text = AnswerText(self.served.tokenizer, request.stop_ids, stops)
            self.jobs.append(Job(index, self.served, request, text, self))

    async def __aiter__(self) -> AsyncIterator[list[tuple[Job, Piece]]]:
        """All pieces that are there, at least one, until every sequence has finished.

        Raises EngineFailed, OpenPalmError where the model failed at one of the sequences, and
        ShuttingDown where the time for finishing is over.
        """
        open_jobs = len(self.jobs)
        while open_jobs:
            batch = [await self.pieces.get()]
            while not self.pieces.empty():
                batch.append(self.pieces.get_nowait())
            pieces = []
            for item in batch:
                if isinstance(item, Broken):
                    raise item
                pieces.append(item)
                open_jobs -= item[1].finish is not None
            yield pieces

    def close(self) -> None:
        """Frees what these sequences still hold; nothing happens where all have finished."""
        self._worker.cancel(self.jobs)


Event = tuple[Job, Piece | Broken | None]
"""What happened to a sequence; None where its caller left it."""


class Worker:
    """Runs the engines in one thread.

    `slots + queue_limit` sequences at most are on their way; `observe(job, piece)` is told of
    every piece, on the event loop.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        queue_limit: int,
        observe: Callable[[Job, Piece], None] = lambda job, piece: None,
    ):
        self.current = served
        self.queue_limit = queue_limit
        self.draining = False
        self.load = 0
        """sequences on their way"""
        self._observe = observe
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[ServedModel, dict[int, Job]] = {}
        self._tickets: dict[Job, int] = {}
        self._stopped = False
        self._logged = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def most(self) -> int:
        """Sequences that can be on their way."""
        return self.current.engine.slots + self.queue_limit

    @property
    def active(self) -> int:
        """Slots in use, of all models."""
        return sum(served.engine.active for served in list(self._running) or [self.current])

    def start(self) -> None:
        """Begins; to be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step; for when nothing is on its way. Any thread."""
        if self._thread.is_alive():
            self._orders.put(self._stop)
            self._thread.join()

    def submit(
        self, served: ServedModel, requests: Sequence[Request], stops: Sequence[str] = ()
    ) -> Answers:
        """Queues the requests of one call. Raises Overloaded or ShuttingDown."""
        if self.draining:
            raise ShuttingDown
        if self.load + len(requests) > self.most:
            raise Overloaded
        answers = Answers(self, served, requests)
        answers.start(stops)
        self.load += len(requests)
        self._orders.put(partial(self._admit, answers.jobs))
        return answers

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forgets these sequences where they are unfinished."""
        self._orders.put(partial(self._drop, jobs))

    def drain(self, seconds: float) -> None:
        """Takes nothing new from now on; what is unfinished after `seconds` is broken off."""
        self.draining = True
        give_up = partial(self._orders.put, self._give_up)
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, give_up)

    # --- on the event loop, called by the thread

    def _deliver(self, events: list[Event]) -> None:
        for job, what in events:
            if isinstance(what, Piece):
                self._observe(job, what)
                job.answers.pieces.put_nowait((job, what))
                self.load -= what.finish is not None
            else:
                self.load -= 1
                if what is not None:
                    job.answers.pieces.put_nowait(what)

    # --- in the thread

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._obey(wait=not self._tickets)
                for served in list(self._running):
                    self._report(self._step(served))
            except BaseException as error:  # the thread outlives whatever goes wrong in it
                failure = self._failure(error)
                for served in list(self._running):
                    self._report(self._break_off(served, failure))

    def _obey(self, *, wait: bool) -> None:
        try:
            while True:
                self._orders.get(block=wait)()
                wait = False
        except queue.Empty:
            pass

    def _stop(self) -> None:
        self._stopped = True

    def _admit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if _asks_nothing(job.request):
                self._report([(job, Piece("", [], "length"))])
                continue
            try:
                ticket = job.served.engine.submit(job.request)
            except BaseException as error:
                self._report([(job, self._failure(error))])
                continue
            self._tickets[job] = ticket
            self._running.setdefault(job.served, {})[ticket] = job

    def _drop(self, jobs: Sequence[Job]) -> None:
        unfinished = [job for job in jobs if job in self._tickets]
        for job in unfinished:
            job.served.engine.cancel(self._tickets[job])
            self._forget(job)
        self._report([(job, None) for job in unfinished])

    def _give_up(self) -> None:
        for served in list(self._running):
            self._report(self._break_off(served, ShuttingDown()))

    def _forget(self, job: Job) -> None:
        ticket = self._tickets.pop(job)
        running = self._running[job.served]
        del running[ticket]
        if not running:
            del self._running[job.served]

    def _step(self, served: ServedModel) -> list[Event]:
        try:
            tokens = served.engine.step()
        except BaseException as error:  # a panic of a library is no Exception
            return self._break_off(served, self._failure(error))
        running, events = self._running[served], []
        for token in tokens:
            job = running.get(token.request)
            if job is None:  # a stop string ended it
                continue
            what = self._said(job, token)
            if what is None:
                continue
            if not isinstance(what, Piece) or what.finish is not None:
                if token.finish is None:
                    served.engine.cancel(token.request)
                self._forget(job)
            events.append((job, what))
        return events

    def _said(self, job: Job, token: Token) -> Piece | Broken | None:
        """What a token adds to its sequence; why it ends here, where that fails."""
        try:
            return _piece(job, token)
        except BaseException as error:  # the tokenizer's panic, say
            return self._failure(error)

    def _failure(self, error: BaseException) -> Broken:
        """The reason that callers get; the log has the trace, once where it repeats itself."""
        if isinstance(error, OpenPalmError):
            return error
        said = reason(error)
        if said != self._logged:
            traceback.print_exception(error)
            self._logged = said
        return EngineFailed(said)

    def _break_off(self, served: ServedModel, reason: Broken) -> list[Event]:
        jobs = list(self._running[served].values())
        served.engine.reset()
        for job in jobs:
            self._forget(job)
        return [(job, reason) for job in jobs]

    def _report(self, events: list[Event]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)


def _asks_nothing(request: Request) -> bool:
    """No new token and no score: a single token has nothing before it that could predict it."""
    scores = request.score_prompt and len(request.ids) > 1
    return request.max_new_tokens == 0 and not scores


def _piece(job: Job, token: Token) -> Piece | None:
    """What a token adds to its sequence, None inside a prompt that is scored.

    Raises NumbersError where its log-probabilities are no numbers, which JSON could not hold.
    """
    numbers = (token.log_prob, *(value for _, value in token.top))
    if token.finish == "error" or not all(map(math.isfinite, numbers)):
        raise NumbersError(NOT_FINITE)
    if job.first_s is None:
        job.first_s = time.perf_counter() - job.began
    if token.of_prompt:
        job.prompt.append(token)
        return Piece("", [], token.finish) if token.finish else None
    job.generated += 1
    return job.text.push(token)
