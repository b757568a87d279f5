"""The job "statistics": all figures of a project; and when it is due."""

from datetime import timedelta
from typing import Any

from django.utils import timezone

from openpalm.feedback.models import Event, Job, Project, Response
from openpalm.feedback.quality.compute import compute
from openpalm.feedback.training import comparisons
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress

REST = 4
"""times its own length that the job of a project pauses: a large project leaves room for others"""


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "statistics"."""
    assert job.project is not None
    seen = newest(job.project)  # before: what comes meanwhile makes it due again
    comparisons.compute_all(job.project, progress.writing)
    progress.say("computing figures")
    compute(job.project, progress.writing)
    return {"newest": seen}


def enqueue_due() -> int:
    """Adds a job for every project with changes since its last one; returns how many."""
    count = 0
    for project in Project.objects.order_by("id"):
        last = Job.objects.filter(kind="statistics", project=project).order_by("-id").first()
        if last is not None and not _rested(last):
            continue
        if newest(project) != (last.result.get("newest", [0, 0, 0]) if last else [0, 0, 0]):
            jobs.enqueue("statistics", project=project)
            count += 1
    return count


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
