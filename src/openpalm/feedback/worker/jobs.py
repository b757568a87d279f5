"""The queue of jobs in the database: adding, taking, finishing and stopping them.

A job that runs belongs to a worker, `Job.worker`. Every write of the worker is conditional on
that, so a worker that was taken for dead, or has to stop, notices it and leaves the job.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Q
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
State = Job.State


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
    """Asks for the end of a job; False if it has ended already. A training saves first."""
    now = timezone.now()
    mine = Job.objects.filter(pk=job.pk)
    if mine.filter(state=State.QUEUED).update(state=State.STOPPED, finished_at=now):
        _end_owner(job, "stopped before it began", stopped=True)
        return True
    # A worker that runs it notices, ends, and stores what became of the job's object.
    return bool(mine.filter(state=State.RUNNING).update(state=State.STOPPED, finished_at=now))


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
        job = free.order_by("id").select_for_update(skip_locked=True, of=("self",)).first()
        if job is None or not _is_first(job, kinds):
            return None
        now = timezone.now()
        job.state, job.worker, job.heartbeat_at = State.RUNNING, worker, now
        job.started_at = job.started_at or now
        job.attempts += 1
        job.save(update_fields=["state", "worker", "heartbeat_at", "started_at", "attempts"])
        return job


def _is_first(job: Job, kinds: Sequence[str]) -> bool:
    """Whether no job of its project runs or waits before it; locks the project to be sure."""
    if job.project_id is None:
        return True
    Project.objects.select_for_update(no_key=True).get(pk=job.project_id)
    same = Job.objects.filter(project_id=job.project_id, kind__in=kinds)
    before = Q(state=State.RUNNING) | Q(state=State.QUEUED, pk__lt=job.pk)
    return not same.filter(before).exists()


def requeue_abandoned() -> int:
    """Jobs of workers that died wait again, or fail after too many attempts; returns how many."""
    count = 0
    for job in Job.objects.filter(state=State.RUNNING):
        beat = job.heartbeat_at or job.created_at
        silent = timezone.now() - beat > timedelta(seconds=DEAD_AFTER_S)
        if not silent and not is_gone(job.worker):
            continue
        mine = Job.objects.filter(pk=job.pk, state=State.RUNNING, worker=job.worker)
        if job.attempts >= MAX_ATTEMPTS:
            message = (
                f"the worker ended {job.attempts} times while it ran this job; its log says why"
            )
            mine.update(state=State.FAILED, message=message, finished_at=timezone.now())
            _end_owner(job, message)
        else:
            mine.update(state=State.QUEUED, worker="")
        count += 1
    return count


def _end_owner(job: Job, message: str, *, stopped: bool = False) -> None:
    """What the job was for ends too, unless its handler has ended it."""
    given = job.arguments
    if "run" in given:
        state = TrainRun.State.STOPPED if stopped else TrainRun.State.FAILED
        unfinished = [TrainRun.State.QUEUED, TrainRun.State.RUNNING]
        TrainRun.objects.filter(pk=given["run"], state__in=unfinished).update(
            state=state, error="" if stopped else message, finished_at=timezone.now()
        )
    elif "comparison" in given:
        making = Comparison.State.GENERATING
        for comparison in Comparison.objects.filter(pk=given["comparison"], state=making):
            comparison.state = Comparison.State.FAILED
            comparison.result |= {"reason": message}
            comparison.save(update_fields=["state", "result"])
    elif "promotion" in given and not given.get("undo"):
        queued = Promotion.State.QUEUED
        Promotion.objects.filter(pk=given["promotion"], state=queued).update(
            state=Promotion.State.FAILED, error=message
        )


def beat(job: Job) -> bool:
    """Tells that the worker lives; False if the job is no longer its own."""
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


def finish(
    job: Job, state: str, *, message: str = "", result: dict[str, Any] | None = None
) -> bool:
    """Ends the job; False if it is no longer this worker's."""
    if state == State.FAILED and _own(job).exists():
        _end_owner(job, message)
    return bool(
        _own(job).update(
            state=state,
            message=message or job.message,
            done=job.done,
            total=job.total,
            result=result or {},
            finished_at=timezone.now(),
        )
    )


def give_back(job: Job) -> bool:
    """The worker ends: the job waits for the next one."""
    return bool(_own(job).update(state=State.QUEUED, worker="", attempts=max(0, job.attempts - 1)))


def _own(job: Job):
    return Job.objects.filter(pk=job.pk, state=State.RUNNING, worker=job.worker)
