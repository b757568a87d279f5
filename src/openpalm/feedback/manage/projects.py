"""Pages of projects: the list, a new one, settings, closing."""

from typing import Any

from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import (
    ProjectRequest,
    project_page,
    signed_in_page,
    site_admin_page,
)
from openpalm.feedback.manage.forms import NewProjectForm, SettingsForm
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import (
    Guideline,
    Invitation,
    Job,
    Membership,
    Project,
    Response,
    Role,
    User,
)
from openpalm.feedback.worker.jobs import stop_waiting


@require_GET
@signed_in_page
def home(request: Any) -> HttpResponse:
    """The user's projects, with the role that they have in each."""
    roles = dict(request.user.memberships.values_list("project_id", "role"))
    projects = Project.objects.order_by("-open", "-id")
    if not request.user.is_superuser:
        projects = projects.filter(pk__in=roles)
    listed = [
        (project, Role.OWNER if request.user.is_superuser else roles[project.pk])
        for project in projects
    ]
    return render(request, "feedback/manage/home.html", {"listed": listed})


@require_http_methods(["GET", "POST"])
@site_admin_page
def project_new(request: Any) -> HttpResponse:
    form = NewProjectForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        project = form.save(commit=False)
        add_project(project, request.user, form.cleaned_data["guidelines"])
        messages.success(request, "The project is created.")
        return redirect("project", project.slug)
    context = {"form": form, "is_first": not Project.objects.exists()}
    status = 422 if form.is_bound else 200
    return render(request, "feedback/manage/project_new.html", context, status=status)


@transaction.atomic
def add_project(project: Project, owner: User, guidelines: str, **details: Any) -> None:
    """Stores a new project with its owner and its first guidelines, if there are any."""
    project.save()
    Membership.objects.create(project=project, user=owner, role=Role.OWNER)
    audit.record("project.made", user=owner, project=project, target=project.slug, **details)
    if text := guidelines.strip():
        Guideline.objects.create(project=project, version=1, text=text, author=owner)


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def settings(request: ProjectRequest) -> HttpResponse:
    project = request.project
    frozen = Response.objects.filter(project=project).exists()
    form = SettingsForm(request.POST or None, instance=project, frozen=frozen)
    if request.method == "POST" and form.is_valid():
        before = SettingsForm(instance=Project.objects.get(pk=project.pk)).initial
        form.save()
        changed = {name: [before[name], form.cleaned_data[name]] for name in form.changed_data}
        audit.record_for(request, "project.changed", target=project.slug, changed=changed)
        messages.success(request, "The settings are stored.")
        return redirect("settings", project.slug)
    if form.is_bound:
        project.refresh_from_db()  # the form has changed the instance
    return page(request, "settings", form=form, status=422 if form.is_bound else 200)


@require_POST
@project_page(Role.OWNER)
def close(request: ProjectRequest) -> HttpResponse:
    """Closes the project: nobody judges or joins, its waiting jobs stop, everything stays.

    A project is not deleted: its audit log and the lineage of its models must be kept.
    """
    project = request.project
    if request.POST.get("slug", "").strip() != project.slug:
        messages.error(request, f"Type {project.slug} to close this project.")
        return redirect("settings", project.slug)
    with transaction.atomic():
        Project.objects.filter(pk=project.pk).update(open=False)
        now = timezone.now()
        Invitation.objects.filter(project=project, revoked_at=None).update(revoked_at=now)
        stop_waiting(Job.objects.filter(project=project), "the project was closed")
        audit.record_for(request, "project.closed", target=project.slug)
    messages.success(request, f"{project.name} is closed. Its data and its audit log are kept.")
    return redirect("home")


@require_POST
@project_page(Role.OWNER)
def reopen(request: ProjectRequest) -> HttpResponse:
    Project.objects.filter(pk=request.project.pk).update(open=True)
    audit.record_for(request, "project.reopened", target=request.project.slug)
    messages.success(request, f"{request.project.name} is open again.")
    return redirect("project", request.project.slug)
