"""Pages of the guidelines: writing a version, all versions with what changed in each."""

import difflib
from collections.abc import Iterator
from itertools import islice

from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_http_methods

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.labeling.context import guideline_in
from openpalm.feedback.labeling.markdown import to_html
from openpalm.feedback.manage.forms import GuidelineForm
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Guideline, Project, Role

MAX_LINES = 3000
"""of a version; comparing takes quadratic time"""


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def edit(request: ProjectRequest) -> HttpResponse:
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
            version = _store(request, text)
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
def _store(request: ProjectRequest, text: str) -> int:
    project = Project.objects.select_for_update().get(pk=request.project.pk)
    version = (project.guideline.version if project.guideline else 0) + 1
    Guideline.objects.create(project=project, version=version, text=text, author=request.user)
    audit.record("guideline.written", user=request.user, project=project, target=version)
    return version


@require_GET
@project_page()
def versions(request: ProjectRequest) -> HttpResponse:
    """All versions; `version` in the address shows one, with its changes to the one before."""
    listed = request.project.guidelines.order_by("-version").defer("text")
    shown = guideline_in(request)
    before = shown and request.project.guidelines.filter(version=shown.version - 1).first()
    return page(
        request,
        "guideline_versions",
        versions=listed.select_related("author"),
        shown=shown,
        html=to_html(shown.text) if shown else "",
        diff=list(_changes(before.text, shown.text)) if shown and before else [],
    )


def _changes(old: str, new: str) -> Iterator[tuple[str, str]]:
    """(mark, line) of each line that is the same (" "), added ("+") or removed ("-")."""
    before, after = old.splitlines(), new.splitlines()
    if max(len(before), len(after)) > MAX_LINES:
        return
    compared = difflib.unified_diff(before, after, lineterm="", n=MAX_LINES)
    for line in islice(compared, 3, None):  # two lines of names, one of line numbers
        yield line[0], line[1:]
