"""Pages of jobs: the list with progress, and the end of one."""

from django.contrib import messages
from django.http import Http404, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Job, Role
from openpalm.feedback.paging import page_of
from openpalm.feedback.worker.jobs import stop

UNFINISHED = (Job.State.QUEUED, Job.State.RUNNING)


@require_GET
@project_page(Role.ADMIN)
def jobs(request: ProjectRequest) -> HttpResponse:
    """With htmx only the table, which asks again while a job is unfinished."""
    rows = Job.objects.filter(project=request.project).select_related("created_by")
    listed = page_of(rows, request, 20)
    template = "jobs_table" if request.htmx else "jobs"  # pyright: ignore
    running = any(job.state in UNFINISHED for job in listed.rows)
    return page(request, template, page=listed, running=running, unfinished=UNFINISHED)


@require_POST
@project_page(Role.ADMIN)
def job_stop(request: ProjectRequest, job_id: int) -> HttpResponse:
    job = Job.objects.filter(project=request.project, pk=job_id).first()
    if job is None:
        raise Http404("there is no such job in this project")
    if stop(job):
        audit.record(
            "job.stopped", user=request.user, project=request.project, target=f"{job.kind} {job.pk}"
        )
    else:
        messages.info(request, "It cannot be stopped: it has ended, or swaps the model.")
    return redirect("jobs", request.project.slug)
