"""Pages of projects: the list, a new one, settings, guidelines, closing."""

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
from openpalm.feedback.labeling.context import guideline_in
from openpalm.feedback.labeling.markdown import to_html
from openpalm.feedback.manage.forms import GuidelineForm, NewProjectForm, SettingsForm
from openpalm.feedback.manage.guideline_diff import changes
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
        messages.success(request, "The project is there.")
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
        audit.record(
            "project.changed",
            user=request.user,
            project=project,
            target=project.slug,
            changed=changed,
        )
        messages.success(request, "The settings are stored.")
        return redirect("settings", project.slug)
    if form.is_bound:
        project.refresh_from_db()  # the form wrote what was sent into it
    return page(request, "settings", form=form, status=422 if form.is_bound else 200)


@require_POST
@project_page(Role.OWNER)
def close(request: ProjectRequest) -> HttpResponse:
    """Closes the project: nobody judges or joins, its waiting jobs stop, everything stays.

    A project is not deleted: its audit log and the lineage of its models must outlive it.
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
        audit.record("project.closed", user=request.user, project=project, target=project.slug)
    messages.success(request, f"{project.name} is closed. Its data and its audit log are kept.")
    return redirect("home")


@require_POST
@project_page(Role.OWNER)
def reopen(request: ProjectRequest) -> HttpResponse:
    Project.objects.filter(pk=request.project.pk).update(open=True)
    audit.record(
        "project.reopened", user=request.user, project=request.project, target=request.project.slug
    )
    messages.success(request, f"{request.project.name} is open again.")
    return redirect("project", request.project.slug)


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def guideline_edit(request: ProjectRequest) -> HttpResponse:
    """Writes the next version; `preview` shows it first."""
    project = request.project
    current = project.guideline
    initial = {"text": current.text if current else ""}
    form = GuidelineForm(request.POST or None, initial=initial)
    preview = None
    if request.method == "POST" and form.is_valid():
        text = form.cleaned_data["text"]
        if "preview" in request.POST:
            preview = to_html(text)
        elif current and text.strip() == current.text.strip():
            form.add_error("text", f"This is the text of version {current.version}.")
        else:
            version = _store_guideline(request, text)
            messages.success(request, f"Version {version} of the guidelines is in force.")
            return redirect("guideline-versions", project.slug)
    return page(
        request,
        "guideline_edit",
        form=form,
        preview=preview,
        current=current,
        status=422 if form.errors else 200,
    )


@transaction.atomic
def _store_guideline(request: ProjectRequest, text: str) -> int:
    project = Project.objects.select_for_update().get(pk=request.project.pk)
    version = (project.guideline.version if project.guideline else 0) + 1
    Guideline.objects.create(project=project, version=version, text=text, author=request.user)
    audit.record("guideline.written", user=request.user, project=project, target=version)
    return version


@require_GET
@project_page()
def guideline_versions(request: ProjectRequest) -> HttpResponse:
    """All versions; `version` in the address shows one, with its changes to the one before."""
    versions = request.project.guidelines.order_by("-version").defer("text")
    shown = guideline_in(request)
    before = shown and request.project.guidelines.filter(version=shown.version - 1).first()
    return page(
        request,
        "guideline_versions",
        versions=versions.select_related("author"),
        shown=shown,
        html=to_html(shown.text) if shown else "",
        diff=list(changes(before.text, shown.text)) if shown and before else [],
    )
