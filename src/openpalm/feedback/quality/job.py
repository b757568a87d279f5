"""The job "statistics": all figures of a project; and when it is due.

Its tables stay in memory for the next job, so that one after a few new judgements reads only these.
"""

from datetime import timedelta
from typing import Any

from django.utils import timezone

from openpalm.feedback.models import Event, Job, Project, Response
from openpalm.feedback.quality.compute import Tables, compute
from openpalm.feedback.quality.response_table import READ_AGAIN
from openpalm.feedback.training import comparisons
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress

REST = 4
"""times its own length that the job of a project pauses: a large project leaves room for others"""
KEPT_ROWS = 4_000_000
"""of all tables that stay in memory: about 150 MB"""
KEPT_JOBS = 10
"""finished jobs of a project that stay in its list; others are deleted"""


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "statistics"."""
    assert job.project is not None
    seen = newest(job.project)  # before: what comes meanwhile makes it due again
    comparisons.compute_all(job.project, progress.writing)
    tables = _kept.take(job.project)
    progress.start(Response.objects.filter(project=job.project).count(), "reading judgements")
    progress.move_to(max(0, len(tables.responses) - READ_AGAIN))
    tables.refresh(job.project, progress.advance)
    progress.say("computing figures")
    compute(job.project, progress.writing, tables)
    _kept.put(tables)
    return {"newest": seen}


class _Kept:
    """The tables of the projects that were computed last."""

    def __init__(self) -> None:
        self._tables: dict[Any, Tables] = {}

    def take(self, project: Project) -> Tables:
        """The project's tables, out of the store: a job that fails leaves none behind."""
        return self._tables.pop(_key(project), None) or Tables(project)

    def put(self, tables: Tables) -> None:
        self._tables[_key(tables.project)] = tables
        while sum(map(len, self._tables.values())) > KEPT_ROWS:
            del self._tables[next(iter(self._tables))]  # the one that was put first


def _key(project: Project) -> Any:
    # With the time, because another database may give the id to another project.
    return project.pk, project.created_at, project.task


_kept = _Kept()


def enqueue_due() -> int:
    """Adds a job for every project with changes since its last one; returns how many."""
    count = 0
    for project in Project.objects.order_by("id"):
        last = Job.objects.filter(kind="statistics", project=project).order_by("-id").first()
        if last is not None and not _rested(last):
            continue
        if newest(project) != (last.result.get("newest", [0, 0, 0]) if last else [0, 0, 0]):
            jobs.enqueue("statistics", project=project)
            _delete_old(project)
            count += 1
    return count


def _delete_old(project: Project) -> None:
    """There is a job every few seconds while people judge; only the last ones tell anything."""
    done = Job.objects.filter(kind="statistics", project=project, state=Job.State.DONE)
    old = done.order_by("-id").values_list("id", flat=True)[KEPT_JOBS : KEPT_JOBS + 100]
    Job.objects.filter(pk__in=list(old)).delete()


def _rested(last: Job) -> bool:
    if last.state in Job.UNFINISHED:
        return False
    if last.started_at is None or last.finished_at is None:
        return True
    pause = min(REST * (last.finished_at - last.started_at), timedelta(minutes=10))
    now = timezone.now()
    return now >= last.finished_at + pause or now < last.finished_at  # a clock that was set back


def newest(project: Project) -> list[int]:
    """Differs after every change that the figures may show, and is read from indexes.

    The newest response and the newest line of the audit log, which has deletions and what managers
    change; and the number of undone judgements, because undoing adds no row.
    """
    responses = Response.objects.filter(project=project)
    undone = responses.filter(state=Response.State.UNDONE).count()
    return [_newest_id(responses), undone, _newest_id(Event.objects.filter(project=project))]


def _newest_id(rows: Any) -> int:
    return rows.order_by("-id").values_list("id", flat=True).first() or 0
