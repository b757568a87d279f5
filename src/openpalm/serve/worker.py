"""The worker thread that runs the engines: requests come in from the event loop, text goes back.

At most `capacity` sequences are in flight; more are refused at once. After a model is replaced,
the old one finishes the sequences that it has begun.

Two threads meet here. The event loop calls the public methods and reads the output streams; it
never touches an engine. The worker thread alone runs the engines. Commands go to the worker through
a queue, events go back through `call_soon_threadsafe`, so no locks are needed.
"""

import asyncio
import math
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import NumbersError, OpenPalmError, one_line
from openpalm.generate.adapters import Adapter
from openpalm.generate.defaults import SamplingDefaults
from openpalm.generate.engine import NOT_FINITE, Engine
from openpalm.generate.request import Request, Token
from openpalm.generate.streaming import CompletionText, TextDelta

T = TypeVar("T")


def run_in_new_thread(work: Callable[[], T]) -> T:
    """Returns the result of `work`, run in a thread that ends with it. Used to load models.

    OpenMP keeps worker threads for every living thread that has computed something. When there are
    more of them than cores, they all sleep between loops: one stream ran at 81 tokens/s instead of
    105 (benchmarks/RESULTS.md). So only the worker thread may keep them.
    """
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(work).result()


class Overloaded(Exception):
    """`capacity` sequences are in flight."""


class ShuttingDown(Exception):
    """The server is shutting down and takes no new requests."""


class EngineFailed(Exception):
    """The engine failed: its sequences are lost, new requests may succeed."""


def error_line(error: BaseException) -> str:
    """An error in one short line."""
    message = one_line(error, 200)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


Failure = EngineFailed | ShuttingDown | OpenPalmError
"""The reason why a sequence ends without a finish reason."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model and its name in the API."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    source: str
    """run, checkpoint or hub name that it was loaded from"""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """sampling settings for requests that set none"""
    adapter: Adapter | None = None
    """LoRA adapter over the engine's model; the engine is shared with the other adapters"""
    directory: Path | None = None
    """the checkpoint's directory, which adapters are checked against"""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int:
        """Maximum tokens of prompt and completion together."""
        return self.engine.model.config.context


@dataclass(eq=False)
class ServedSequence:
    """One sequence of a call, and what has been generated of it."""

    index: int
    """its number among the call's sequences"""
    served: ServedModel
    request: Request
    text: CompletionText
    output: "OutputStream"
    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: list[Token] = field(default_factory=list)
    """the scored tokens of the prompt, if it is scored; complete with the first delta"""
    generated: int = 0
    """generated tokens"""
    first_token_s: float | None = None
    """seconds to the first token"""


class OutputStream:
    """The text of one call's sequences as it is generated. Closing it early cancels them."""

    def __init__(
        self,
        worker: "Worker",
        served: ServedModel,
        requests: Sequence[Request],
        stops: Sequence[str],
    ):
        self.served = served
        self.sequences = [
            ServedSequence(
                i,
                served,
                # Set here, so that no route can forget it.
                replace(request, adapter=served.adapter),
                CompletionText(served.tokenizer, request.stop_ids, stops),
                self,
            )
            for i, request in enumerate(requests)
        ]
        self.events: asyncio.Queue[tuple[ServedSequence, TextDelta] | Failure] = asyncio.Queue()
        self._worker = worker

    async def __aiter__(self) -> AsyncIterator[list[tuple[ServedSequence, TextDelta]]]:
        """Yields all deltas that are ready, at least one, until every sequence has finished.

        Raises EngineFailed, OpenPalmError if the model failed at one of the sequences, and
        ShuttingDown after the shutdown timeout.
        """
        unfinished = len(self.sequences)
        while unfinished:
            events = [await self.events.get()]
            while not self.events.empty():
                events.append(self.events.get_nowait())
            deltas = []
            for event in events:
                if isinstance(event, Failure):
                    raise event
                deltas.append(event)
                unfinished -= event[1].finish is not None
            yield deltas

    def close(self) -> None:
        """Cancels the sequences that have not finished."""
        self._worker.cancel(self.sequences)


Event = tuple[ServedSequence, TextDelta | Failure | None]
"""A sequence's new text or failure; None after its caller cancelled it."""


class Worker:
    """Runs the engines in one thread.

    At most the engine's slots + `max_queue` sequences are in flight. `observe(sequence, delta)` is
    called with every delta, on the event loop.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        max_queue: int,
        observe: Callable[[ServedSequence, TextDelta], None] = lambda sequence, delta: None,
    ):
        self.current = served
        """the model of requests that name none"""
        self.adapters: dict[str, ServedModel] = {}
        """adapters over the current model, by name; they share its engine"""
        self.max_queue = max_queue
        self.shutting_down = False
        self.in_flight = 0
        """sequences that are generated or wait"""
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # The worker thread's own state. A replaced model leaves with its last sequence.
        self._unfinished: dict[Engine, dict[int, ServedSequence]] = {}
        self._request_ids: dict[ServedSequence, int] = {}
        self._stopped = False
        self._last_logged = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def capacity(self) -> int:
        """Maximum sequences in flight."""
        return self.current.engine.slots + self.max_queue

    @property
    def models(self) -> list[ServedModel]:
        """The models that requests may name: the current one, then its adapters."""
        return [self.current, *self.adapters.values()]

    def replace_model(self, served: ServedModel) -> list[ServedModel]:
        """Serves another model to new requests. Returns the models no longer served: the old one
        and its adapters, which do not fit the new one."""
        removed, self.current, self.adapters = self.models, served, {}
        return removed

    @property
    def running(self) -> int:
        """Sequences that are generated at the moment, of all models."""
        return sum(engine.active for engine in list(self._unfinished) or [self.current.engine])

    def start(self) -> None:
        """Starts the thread. Must be called on the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step, when nothing is in flight. Any thread."""
        if self._thread.is_alive():
            self._commands.put(self._stop)
            self._thread.join()

    def submit(
        self, served: ServedModel, requests: Sequence[Request], stops: Sequence[str] = ()
    ) -> OutputStream:
        """Queues the requests of one call. Raises Overloaded or ShuttingDown."""
        if self.shutting_down:
            raise ShuttingDown
        # Counted here, not in the thread: the next call must see this one's sequences.
        if self.in_flight + len(requests) > self.capacity:
            raise Overloaded
        output = OutputStream(self, served, requests, stops)
        self.in_flight += len(requests)
        self._commands.put(partial(self._admit, output.sequences))
        return output

    def cancel(self, sequences: Sequence[ServedSequence]) -> None:
        """Cancels those of the sequences that have not finished."""
        self._commands.put(partial(self._cancel, sequences))

    def shut_down(self, timeout_s: float) -> None:
        """Refuses new requests; after `timeout_s` fails the sequences that have not finished."""
        self.shutting_down = True
        time_out = partial(self._commands.put, self._time_out)
        # Called by a signal handler, so the timer must be set on the event loop.
        self._loop.call_soon_threadsafe(self._loop.call_later, timeout_s, time_out)

    # --- on the event loop, called by the worker thread

    def _deliver(self, events: list[Event]) -> None:
        for sequence, outcome in events:
            if isinstance(outcome, TextDelta):
                self._observe(sequence, outcome)
                sequence.output.events.put_nowait((sequence, outcome))
                self.in_flight -= outcome.finish is not None
            else:
                self.in_flight -= 1
                if outcome is not None:
                    sequence.output.events.put_nowait(outcome)

    # --- in the worker thread

    def _run(self) -> None:
        while not self._stopped:
            try:
                # Cancellations come before each step: a caller who leaves frees its slot within
                # two steps. With nothing to generate the thread sleeps until a command arrives.
                self._run_commands(wait=not self._request_ids)
                for engine in list(self._unfinished):
                    self._report(self._step(engine))
            except BaseException as error:  # the thread must survive any error, panics included
                failure = self._failure(error)
                for engine in list(self._unfinished):
                    self._report(self._fail_all(engine, failure))

    def _run_commands(self, *, wait: bool) -> None:
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except queue.Empty:
            pass

    def _stop(self) -> None:
        self._stopped = True

    def _admit(self, sequences: Sequence[ServedSequence]) -> None:
        for sequence in sequences:
            if _is_empty(sequence.request):
                self._report([(sequence, TextDelta("", [], "length"))])
                continue
            try:
                # The engine queues the request until a slot is free, and prefills the prompt in
                # chunks within its steps, so a long prompt does not stall the other sequences.
                request_id = sequence.served.engine.submit(sequence.request)
            except BaseException as error:
                self._report([(sequence, self._failure(error))])
                continue
            self._request_ids[sequence] = request_id
            self._unfinished.setdefault(sequence.served.engine, {})[request_id] = sequence

    def _cancel(self, sequences: Sequence[ServedSequence]) -> None:
        # Those that finished before the command arrived are already counted.
        cancelled = [sequence for sequence in sequences if sequence in self._request_ids]
        for sequence in cancelled:
            sequence.served.engine.cancel(self._request_ids[sequence])
            self._forget(sequence)
        self._report([(sequence, None) for sequence in cancelled])

    def _time_out(self) -> None:
        for engine in list(self._unfinished):
            self._report(self._fail_all(engine, ShuttingDown()))

    def _forget(self, sequence: ServedSequence) -> None:
        request_id = self._request_ids.pop(sequence)
        engine = sequence.served.engine
        unfinished = self._unfinished[engine]
        del unfinished[request_id]
        if not unfinished:  # the last reference to a replaced model: its memory becomes free
            del self._unfinished[engine]

    def _step(self, engine: Engine) -> list[Event]:
        """Generates one token of every running sequence of an engine."""
        try:
            tokens = engine.step()
        except BaseException as error:  # a panic in a library is not an Exception
            return self._fail_all(engine, self._failure(error))
        unfinished, events = self._unfinished[engine], []
        for token in tokens:
            sequence = unfinished.get(token.request)
            if sequence is None:  # an earlier token of this step ended it
                continue
            outcome = self._outcome(sequence, token)
            if outcome is None:
                continue
            if not isinstance(outcome, TextDelta) or outcome.finish is not None:
                # A stop string or a failure ends the sequence; the engine would continue it.
                if token.finish is None:
                    engine.cancel(token.request)
                self._forget(sequence)
            events.append((sequence, outcome))
        return events

    def _outcome(self, sequence: ServedSequence, token: Token) -> TextDelta | Failure | None:
        """The text that a token adds to its sequence, or the failure that ends it."""
        try:
            return _delta(sequence, token)
        except BaseException as error:  # for example a panic in the tokenizer
            return self._failure(error)

    def _failure(self, error: BaseException) -> Failure:
        """The failure that callers get. The traceback goes to the log, once if it repeats."""
        if isinstance(error, OpenPalmError):
            return error
        line = error_line(error)
        if line != self._last_logged:
            traceback.print_exception(error)
            self._last_logged = line
        return EngineFailed(line)

    def _fail_all(self, engine: Engine, failure: Failure) -> list[Event]:
        sequences = list(self._unfinished[engine].values())
        engine.reset()
        for sequence in sequences:
            self._forget(sequence)
        return [(sequence, failure) for sequence in sequences]

    def _report(self, events: list[Event]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)


def _is_empty(request: Request) -> bool:
    """Whether there is nothing to compute: no new token, and no token with a score.

    The first token has no score, since nothing before it predicts it.
    """
    scores = request.score_prompt and len(request.ids) > 1
    return request.max_new_tokens == 0 and not scores


def _delta(sequence: ServedSequence, token: Token) -> TextDelta | None:
    """The text that a token adds to its sequence; None inside a prompt that is scored.

    Raises NumbersError for log-probabilities that are not finite: JSON cannot hold them.
    """
    numbers = (token.log_prob, *(value for _, value in token.top))
    if token.finish == "error" or not all(map(math.isfinite, numbers)):
        raise NumbersError(NOT_FINITE)
    if sequence.first_token_s is None:
        sequence.first_token_s = time.perf_counter() - sequence.started
    if token.of_prompt:
        sequence.prompt_tokens.append(token)
        return TextDelta("", [], token.finish) if token.finish else None
    sequence.generated += 1
    return sequence.text.push(token)
