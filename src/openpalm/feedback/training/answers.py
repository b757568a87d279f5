"""Answers of a model to prompts, over HTTP, several at a time; none twice after a kill.

The sampling of an answer, its seed included, is fixed before it is asked for. An answer that is
stored already, from before a kill, is found by its sampling and not asked for again.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from time import monotonic, sleep
from typing import Any

from openpalm.errors import DataError, OpenPalmError, WorkError
from openpalm.feedback.items.model_names import names_itself, names_of
from openpalm.feedback.model_server import ModelServer, NoAnswerError
from openpalm.feedback.models import Candidate, ModelVersion, Prompt
from openpalm.feedback.worker.progress import Progress

AT_ONCE = 8
"""requests in flight; the server generates them in one batch"""
PROMPTS_AT_ONCE = 200
CHECK_EVERY_S = 1.0
"""while no answer comes: whether the job must stop"""
PATIENCE_S, PAUSE_S = 120.0, 1.0
"""how long an answer is asked for again from a server that is away, and how often"""
MOST_FAILURES = 20
"""answers in a row without a success, after which the job fails"""
DEFAULT_SAMPLING = {"temperature": 1.0, "max_tokens": 256}
LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "max_tokens": (1, 100_000),
}


def check_sampling(given: Mapping[str, Any]) -> dict[str, float]:
    """Numbers that the server takes. Raises DataError naming a wrong one."""
    checked = {}
    for name, value in given.items():
        if name not in LIMITS:
            raise DataError(f"{name}: is no sampling setting; use {', '.join(LIMITS)}")
        low, high = LIMITS[name]
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            raise DataError(f"{name} {value!r:.40}: must be a number from {low:g} to {high:g}")
        checked[name] = value
    return checked


@dataclass(frozen=True)
class Wanted:
    """An answer to generate: the number `draw` of this model to this prompt."""

    prompt: Prompt
    sampling: dict[str, Any]


@dataclass
class Answers:
    """Counts of one call, and the reason of the last answer that failed."""

    made: int = 0
    found: int = 0
    failed: int = 0
    reason: str = ""
    failures_in_a_row: int = 0


def sampling_of(
    model: ModelVersion, prompt: Prompt, sampling: Mapping[str, Any], draw: int
) -> dict[str, Any]:
    """The sampling with the seed of this draw, the same at every attempt."""
    text = f"{model.checkpoint or model.pk}:{prompt.digest}:{draw}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
    return {**sampling, "seed": seed}


def generate(
    server: ModelServer,
    model: ModelVersion,
    wanted: Iterable[Wanted],
    progress: Progress,
) -> Answers:
    """Stores each wanted answer as a candidate, unless it is stored already.

    A prompt that the server refuses (too long, say) is counted with the reason. Raises WorkError
    if the server fails many times in a row.
    """
    counts = Answers()
    name, names = server.model_name(), names_of(model.project)
    waiting = iter(wanted)
    while group := list(islice(waiting, PROMPTS_AT_ONCE)):
        missing = _missing(model, group)
        counts.found += len(group) - len(missing)
        progress.advance(len(group) - len(missing))
        for each, text in _ask(server, name, missing, counts, progress):
            candidate = Candidate(
                prompt=each.prompt,
                text=text,
                model=model,
                checkpoint=model.checkpoint,
                sampling=each.sampling,
                draw=draw_digest(each.sampling),
                names_itself=names_itself(text, names),
            )
            server.confirm()
            with progress.writing():
                # The table has each draw once, whoever stores it.
                Candidate.objects.bulk_create([candidate], ignore_conflicts=True)
            counts.made += 1
    return counts


def _missing(model: ModelVersion, group: Sequence[Wanted]) -> list[Wanted]:
    stored = stored_answers(model, [each.prompt.pk for each in group])
    return [each for each in group if answer_key(each.prompt.pk, each.sampling) not in stored]


def stored_answers(model: ModelVersion, prompts: Sequence[int]) -> dict[Any, Candidate]:
    """The model's candidates of these prompts, by `answer_key`."""
    found = Candidate.objects.filter(model=model, prompt__in=prompts).order_by("-id")
    return {answer_key(each.prompt_id, each.sampling): each for each in found}


def draw_digest(sampling: Mapping[str, Any]) -> str:
    """SHA-256 of the sampling as canonical JSON: a name of the draw for the table."""
    return hashlib.sha256(json.dumps(sampling, sort_keys=True).encode()).hexdigest()


def answer_key(prompt: int, sampling: Mapping[str, Any] | None) -> Any:
    return prompt, tuple(sorted((sampling or {}).items(), key=lambda pair: pair[0]))


def _ask(
    server: ModelServer,
    name: str,
    wanted: Sequence[Wanted],
    counts: Answers,
    progress: Progress,
) -> Iterator[tuple[Wanted, str]]:
    """The texts as they come. The database is used by the calling thread only."""

    def ask(each: Wanted) -> str:
        body = {"model": name, "messages": each.prompt.messages, **each.sampling}
        give_up_at = monotonic() + PATIENCE_S
        while True:
            try:
                return server.complete(body)[0]
            except NoAnswerError:  # after a crash it starts again and loads its model
                if monotonic() > give_up_at:
                    raise
                sleep(PAUSE_S)

    waiting = iter(wanted)
    running: dict[Future[str], Wanted] = {}
    while True:
        for each in islice(waiting, AT_ONCE - len(running)):
            running[_in_thread(partial(ask, each))] = each
        if not running:
            return
        done, _ = wait(running, timeout=CHECK_EVERY_S, return_when=FIRST_COMPLETED)
        progress.check()
        for future in done:
            each = running.pop(future)
            if (text := _text(future, counts)) is not None:
                yield each, text
            progress.advance()


def _in_thread(ask: Callable[[], str]) -> Future[str]:
    """Not in an executor, which waits for its threads: a server that answers nothing for minutes
    would hold up the stop of the job and the end of the worker."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="answer", daemon=True).start()
    return future


def _text(future: Future[str], counts: Answers) -> str | None:
    """The answer; None if it failed. Raises WorkError after too many failures in a row."""
    try:
        text = future.result()
    except OpenPalmError as error:
        counts.failed += 1
        counts.failures_in_a_row += 1
        counts.reason = str(error)
        if counts.failures_in_a_row >= MOST_FAILURES:
            raise WorkError(
                f"{counts.failures_in_a_row} answers in a row failed: {error}"
            ) from None
        return None
    counts.failures_in_a_row = 0
    return text
