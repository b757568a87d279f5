"""The queue of jobs in the database: adding, taking, finishing and stopping them.

A job that runs belongs to the worker that took it last, `Job.lease`. Every write of the worker is
conditional on that, so a worker that was taken for dead, or has to stop, notices it and leaves the
job: one that was frozen for an hour writes nothing when it wakes.
"""

from collections.abc import Sequence
from time import monotonic
from typing import Any

from django.db import connection, transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from openpalm.feedback.models import Comparison, Job, Project, Promotion, TrainRun, User
from openpalm.feedback.worker.identity import is_gone

KINDS = (
    "generate",  # candidates of prompts, from model servers
    "select",  # the next batch of items
    "statistics",  # all figures of a project
    "train",  # a TrainRun
    "score",  # candidates with a reward model
    "compare",  # the pairs of a Comparison
    "promote",  # a Promotion, or its undoing
    "import",  # an uploaded file
)
SLOTS: dict[str, tuple[str, ...]] = {
    "training": ("train",),
    "figures": ("statistics",),
    "other": tuple(kind for kind in KINDS if kind not in ("train", "statistics")),
}
"""Kinds that run one after the other; a long training, or the figures of a large project, hold up
nothing else."""
DEAD_AFTER_S = 15.0
MAX_ATTEMPTS = 5
"""times that a job is taken up in a row without progress in between"""
FROZEN_S = 60
"""after which PostgreSQL ends a transaction in which nothing happens: its worker is frozen"""
State = Job.State
_beats: dict[int, tuple[object, float]] = {}
"""the last heartbeat seen of each running job, and when, on this process's own clock"""


def enqueue(
    kind: str, *, project: Project | None = None, user: User | None = None, **arguments: Any
) -> Job:
    """Adds a job. The worker runs jobs of one project and one slot in order."""
    if kind not in KINDS:
        raise ValueError(f"{kind}: there is no such kind of job")
    return Job.objects.create(kind=kind, project=project, created_by=user, arguments=arguments)


def enqueue_once(kind: str, *, project: Project, user: User | None = None) -> Job:
    """The project's waiting job of this kind, or a new one: enough for work without arguments."""
    waiting = Job.objects.filter(kind=kind, project=project, state=State.QUEUED).first()
    return waiting or enqueue(kind, project=project, user=user)


def stop(job: Job) -> bool:
    """Asks for the end of a job; False if it has ended already. A training saves first.

    A promotion that has begun cannot be stopped: the server may have the model.
    """
    mine = Job.objects.filter(pk=job.pk)
    if stop_waiting(mine):
        return True
    with transaction.atomic():
        ended = {"state": State.STOPPED, "finished_at": timezone.now()}
        if not mine.filter(state=State.RUNNING).exclude(kind="promote").update(**ended):
            return False
        _end_owner(job, "stopped", stopped=True)  # its worker notices and may write nothing more
        return True


@transaction.atomic
def stop_waiting(jobs: "QuerySet[Job]", message: str = "stopped before it began") -> int:
    """Stops those of the jobs that wait, with what they were for; returns how many."""
    count = 0
    for job in jobs.filter(state=State.QUEUED).exclude(kind="promote", lease__gt=0):
        ended = {"state": State.STOPPED, "message": message, "finished_at": timezone.now()}
        if Job.objects.filter(pk=job.pk, state=State.QUEUED).update(**ended):
            _end_owner(job, message, stopped=True)
            count += 1
    return count


def take(worker: str, kinds: Sequence[str]) -> Job | None:
    """The oldest waiting job of these kinds, now this worker's; None if there is none."""
    requeue_abandoned()
    # A look without a lock first: SQLite locks the whole database for a transaction.
    if not Job.objects.filter(state=State.QUEUED, kind__in=kinds).exists():
        return None
    with transaction.atomic():
        busy = Job.objects.filter(state=State.RUNNING, kind__in=kinds, project__isnull=False)
        waiting = Job.objects.filter(state=State.QUEUED, kind__in=kinds)
        free = waiting.exclude(project__in=busy.values("project"))
        if Job.objects.filter(kind="promote", state=State.RUNNING).exists():
            free = free.exclude(kind="promote")
        job = free.order_by("id").select_for_update(skip_locked=True, of=("self",)).first()
        if job is None or not _is_first(job, kinds):
            return None
        now = timezone.now()
        job.state, job.worker, job.heartbeat_at = State.RUNNING, worker, now
        job.started_at = job.started_at or now
        job.attempts += 1
        job.lease += 1
        changed = ("state", "worker", "heartbeat_at", "started_at", "attempts", "lease")
        job.save(update_fields=changed)
        return job


def _is_first(job: Job, kinds: Sequence[str]) -> bool:
    """Whether no job of its project runs or waits before it; locks the project to be sure."""
    if job.project_id is None:
        return True
    Project.objects.select_for_update(no_key=True).get(pk=job.project_id)
    same = Job.objects.filter(project_id=job.project_id, kind__in=kinds)
    before = Q(state=State.RUNNING) | Q(state=State.QUEUED, pk__lt=job.pk)
    return not same.filter(before).exists() and (job.kind != "promote" or _is_only_promotion())


def _is_only_promotion() -> bool:
    """Whether none runs: all projects have one model server. Locks the site to be sure."""
    Project.objects.select_for_update(no_key=True).order_by("id").first()
    return not Job.objects.filter(kind="promote", state=State.RUNNING).exists()


def requeue_abandoned() -> int:
    """Jobs of workers that died wait again, or fail after too many attempts; returns how many."""
    running = list(Job.objects.filter(state=State.RUNNING))
    for pk in set(_beats) - {job.pk for job in running}:
        _beats.pop(pk, None)
    lost = [job for job in running if is_gone(job.worker) or _is_silent(job)]
    return sum(map(_requeue, lost))


def _is_silent(job: Job) -> bool:
    """Whether its heartbeat has stopped. The clock may jump and is not used."""
    beat = job.lease, job.heartbeat_at
    seen, since = _beats.get(job.pk, (None, 0.0))
    if seen != beat:
        _beats[job.pk] = beat, monotonic()
        return False
    return monotonic() - since > DEAD_AFTER_S


@transaction.atomic
def _requeue(job: Job) -> bool:
    mine = Job.objects.filter(pk=job.pk, state=State.RUNNING, lease=job.lease)
    # A worker that is writing at this moment lives.
    if not mine.select_for_update(skip_locked=True, no_key=True).exists():
        return False
    if job.attempts < MAX_ATTEMPTS:
        mine.update(state=State.QUEUED, worker="")
        return True
    message = f"the worker ended {job.attempts} times while it ran this job; its log says why"
    mine.update(state=State.FAILED, message=message, finished_at=timezone.now())
    _end_owner(job, message)
    return True


def _end_owner(job: Job, message: str, *, stopped: bool = False) -> None:
    """Ends the run, comparison or promotion of the job, unless its handler has ended it."""
    given = job.arguments
    if "run" in given:
        state = TrainRun.State.STOPPED if stopped else TrainRun.State.FAILED
        TrainRun.objects.filter(pk=given["run"], state__in=TrainRun.UNFINISHED).update(
            state=state, error="" if stopped else message, finished_at=timezone.now()
        )
    elif "comparison" in given:
        making = Comparison.State.GENERATING
        for comparison in Comparison.objects.filter(pk=given["comparison"], state=making):
            comparison.state = Comparison.State.FAILED
            comparison.result |= {"reason": message}
            comparison.save(update_fields=["state", "result"])
    elif "promotion" in given:
        done = Promotion.State.DONE if given.get("undo") else Promotion.State.QUEUED
        failed = {} if given.get("undo") else {"state": Promotion.State.FAILED}
        Promotion.objects.filter(pk=given["promotion"], state=done).update(error=message, **failed)


def beat(job: Job) -> bool:
    """Stores a heartbeat; False if the job is no longer this worker's."""
    return bool(_own(job).update(heartbeat_at=timezone.now()))


def report(job: Job) -> bool:
    """Stores done, total and message; False if the job is no longer this worker's."""
    return bool(
        _own(job).update(
            done=job.done,
            total=job.total,
            message=job.message,
            attempts=job.attempts,
            heartbeat_at=timezone.now(),
        )
    )


@transaction.atomic
def finish(
    job: Job, state: str, *, message: str = "", result: dict[str, Any] | None = None
) -> bool:
    """Ends the job; False if it is no longer this worker's."""
    ended = _own(job).update(
        state=state,
        message=message or job.message,
        done=job.done,
        total=job.total,
        result=result or {},
        finished_at=timezone.now(),
    )
    if ended and state == State.FAILED:
        _end_owner(job, message)
    return bool(ended)


def give_back(job: Job, message: str | None = None) -> bool:
    """The job waits for the next worker, or for this one in a while; `message` says why."""
    why = {} if message is None else {"message": message}
    attempts = max(0, job.attempts - 1)
    return bool(_own(job).update(state=State.QUEUED, worker="", attempts=attempts, **why))


def is_own(job: Job) -> bool:
    """Whether the job is this worker's still, and stays so until the open transaction ends."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL idle_in_transaction_session_timeout = '{FROZEN_S}s'")
    # On SQLite the transaction has the whole database for itself.
    return _own(job).select_for_update(no_key=True).exists()


def _own(job: Job) -> "QuerySet[Job]":
    return Job.objects.filter(pk=job.pk, state=State.RUNNING, lease=job.lease)
