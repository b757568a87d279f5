"""Pages of jobs: the list with progress, and stopping one."""

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.manage.pages import find, page
from openpalm.feedback.models import Job, Role
from openpalm.feedback.paging import page_of
from openpalm.feedback.worker.jobs import stop


@require_GET
@project_page(Role.ADMIN)
def jobs(request: ProjectRequest) -> HttpResponse:
    """With htmx, only the table, which reloads while a job is unfinished."""
    rows = Job.objects.filter(project=request.project).select_related("created_by")
    listed = page_of(rows, request, 20)
    template = "jobs_table" if request.htmx else "jobs"  # pyright: ignore
    running = any(job.state in Job.UNFINISHED for job in listed.rows)
    return page(request, template, page=listed, running=running, unfinished=Job.UNFINISHED)


@require_POST
@project_page(Role.ADMIN)
def job_stop(request: ProjectRequest, job_id: int) -> HttpResponse:
    job = find(Job.objects.all(), job_id, request)
    if stop(job):
        audit.record_for(request, "job.stopped", target=f"{job.kind} {job.pk}")
    else:
        messages.info(request, "It cannot be stopped: it has ended, or swaps the model.")
    return redirect("jobs", request.project.slug)
