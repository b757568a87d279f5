"""Pages of prompts: the list, typing, uploading, holding out."""

from typing import Any

from django import forms
from django.conf import settings
from django.contrib import messages
from django.db import Error, transaction
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.forms import PlainLabels
from openpalm.feedback.imports import uploads
from openpalm.feedback.items.prompts import add_new, set_held_out
from openpalm.feedback.manage.forms import ShareField
from openpalm.feedback.manage.pages import find, page
from openpalm.feedback.models import Prompt, Role
from openpalm.feedback.paging import page_of
from openpalm.feedback.worker.jobs import enqueue

SOURCES = ("file", "chat", "typed", "api")
MAX_TYPED = 500


class UploadForm(PlainLabels, forms.Form):
    """A file of prompts or of items, and what to do with it."""

    file = forms.FileField(help_text=".jsonl, .jsonl.gz, .json, .csv with a header, or .txt")
    what = forms.ChoiceField(
        label="Take from it",
        choices=[
            ("prompts", "prompts only"),
            ("items", "prompts with their answers, to be judged"),
        ],
    )
    held_out = ShareField(
        label="Held-out prompts (%)",
        required=False,
        help_text="Kept for comparisons of models, never trained on. The text decides which ones, "
        "so that the same file gives the same share again.",
    )
    gold = forms.BooleanField(label="Use its judgements as gold", required=False)


class TypedForm(PlainLabels, forms.Form):
    text = forms.CharField(
        label="Prompts",
        max_length=200_000,
        widget=forms.Textarea,
        help_text="A blank line separates one prompt from the next.",
    )
    system = forms.CharField(label="System message (optional)", max_length=20_000, required=False)
    held_out = ShareField(label="Held-out prompts (%)", required=False)

    def clean_text(self) -> list[str]:
        lines = self.cleaned_data["text"].replace("\r\n", "\n")
        texts = [text.strip() for text in lines.split("\n\n") if text.strip()]
        if len(texts) > MAX_TYPED:
            raise forms.ValidationError(
                f"{len(texts)} prompts; type at most {MAX_TYPED}, or upload a file"
            )
        return texts


@require_GET
@project_page(Role.ADMIN)
def prompts(request: ProjectRequest) -> HttpResponse:
    return _prompts(request)


def _prompts(request: ProjectRequest, status: int = 200, **forms_given: Any) -> HttpResponse:
    rows = Prompt.objects.filter(project=request.project)
    if (source := request.GET.get("source")) in SOURCES:
        rows = rows.filter(source=source)
    if (held_out := request.GET.get("held_out")) in ("0", "1"):
        rows = rows.filter(held_out=held_out == "1")
    context = {
        "page": page_of(rows, request),
        "sources": SOURCES,
        "source": source,
        "held_out": held_out,
        "upload_form": UploadForm(),
        "typed_form": TypedForm(),
        "limit_mb": settings.FEEDBACK_MAX_UPLOAD_BYTES // 2**20,
    }
    return page(request, "prompts", status=status, **context | forms_given)


@require_POST
@project_page(Role.ADMIN)
def upload(request: ProjectRequest) -> HttpResponse:
    """Stores the file and queues its import."""
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return _prompts(request, 422, upload_form=form)
    given = form.cleaned_data
    try:
        stored, name = uploads.store(given["file"])
    except DataError as error:
        form.add_error("file", str(error))
        return _prompts(request, 422, upload_form=form)
    try:
        _start_import(request, stored, name, given)
    except Error:
        uploads.path_of(stored).unlink(missing_ok=True)
        raise
    messages.success(request, f"{name} is uploaded; the worker reads it now.")
    return redirect("jobs", request.project.slug)


@transaction.atomic
def _start_import(request: ProjectRequest, stored: str, name: str, given: dict[str, Any]) -> None:
    taken = {"what": given["what"], "held_out": given["held_out"] or 0.0, "gold": given["gold"]}
    about = {"user": request.user, "project": request.project}
    enqueue("import", **about, file=stored, name=name, **taken)
    audit.record_for(request, "import.started", target=name, what=given["what"])


@require_POST
@project_page(Role.ADMIN)
def typed(request: ProjectRequest) -> HttpResponse:
    form = TypedForm(request.POST)
    if not form.is_valid():
        return _prompts(request, 422, typed_form=form)
    given = form.cleaned_data
    system = [{"role": "system", "content": given["system"]}] if given["system"].strip() else []
    conversations = [[*system, {"role": "user", "content": text}] for text in given["text"]]
    count = len(add_new(request.project, conversations, "typed", given["held_out"] or 0.0))
    audit.record_for(request, "prompt.typed", count=count)
    messages.success(request, f"{count} new prompts." if count != 1 else "One new prompt.")
    return redirect("prompts", request.project.slug)


@require_POST
@project_page(Role.ADMIN)
def held_out(request: ProjectRequest, prompt_id: int) -> HttpResponse:
    """Holds a prompt out of training, or gives it back; refused once it has an item."""
    prompt = find(Prompt.objects.all(), prompt_id, request)
    try:
        set_held_out(prompt, not prompt.held_out, request.user)
    except DataError as error:
        messages.error(request, f"Not changed: {error}.")
    return redirect("prompts", request.project.slug)
