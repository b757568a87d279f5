"""The job "statistics": all figures of a project; and when it is due."""

from typing import Any

from openpalm.feedback.models import Job, Project, Response
from openpalm.feedback.quality.compute import compute
from openpalm.feedback.training import comparisons
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "statistics"."""
    assert job.project is not None
    newest = newest_response(job.project)  # before: one that comes meanwhile makes it due again
    comparisons.compute_all(job.project)
    progress.say("computing figures")
    compute(job.project, progress.check)
    return {"up_to": newest}


def enqueue_due() -> int:
    """Adds a job for every project with judgements since its last one; returns how many."""
    count = 0
    for project in Project.objects.order_by("id"):
        known = Job.objects.filter(kind="statistics", project=project).order_by("-id").first()
        if known is not None and known.state in (Job.State.QUEUED, Job.State.RUNNING):
            continue
        newest = newest_response(project)
        if newest > (known.result.get("up_to", 0) if known is not None else 0):
            jobs.enqueue("statistics", project=project)
            count += 1
    return count


def newest_response(project: Project) -> int:
    found = Response.objects.filter(project=project).order_by("-id")
    return found.values_list("id", flat=True).first() or 0
