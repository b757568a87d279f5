"""Pages of prompts: the list, typed ones, uploads, which are held out."""

from typing import Any

from django import forms
from django.conf import settings
from django.contrib import messages
from django.db import Error, transaction
from django.http import Http404, HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.forms import PlainLabels
from openpalm.feedback.labeling.new_items import (
    NewItem,
    add_items,
    add_split_prompts,
    known_digests,
    prompt_digest,
)
from openpalm.feedback.labeling.tasks import candidates_needed
from openpalm.feedback.manage import uploads
from openpalm.feedback.manage.forms import ShareField
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import Item, Prompt, Role, Task
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
        "writes_answers": request.project.task == Task.DEMONSTRATION,
    }
    return page(request, "prompts", status=status, **context | forms_given)


@require_POST
@project_page(Role.ADMIN)
def upload(request: ProjectRequest) -> HttpResponse:
    """Keeps the file and hands it to the worker."""
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
    about = {"user": request.user, "project": request.project}
    taken = {"what": given["what"], "held_out": given["held_out"] or 0.0, "gold": given["gold"]}
    enqueue("import", **about, file=stored, name=name, **taken)
    audit.record("import.started", **about, target=name, what=given["what"])


@require_POST
@project_page(Role.ADMIN)
def typed(request: ProjectRequest) -> HttpResponse:
    form = TypedForm(request.POST)
    if not form.is_valid():
        return _prompts(request, 422, typed_form=form)
    given = form.cleaned_data
    system = [{"role": "system", "content": given["system"]}] if given["system"].strip() else []
    conversations = [[*system, {"role": "user", "content": text}] for text in given["text"]]
    count = _add_typed(request, conversations, given["held_out"] or 0.0)
    audit.record("prompt.typed", user=request.user, project=request.project, count=count)
    messages.success(request, f"{count} new prompts." if count != 1 else "One new prompt.")
    return redirect("prompts", request.project.slug)


def _add_typed(
    request: ProjectRequest, conversations: list[list[dict[str, str]]], share: float
) -> int:
    """Adds the new ones; returns how many. Where people write the answers, each is an item."""
    project = request.project
    by_digest = {prompt_digest(messages): messages for messages in conversations}
    earlier = known_digests(project, by_digest)
    fresh = {digest: each for digest, each in by_digest.items() if digest not in earlier}
    if candidates_needed(project.task) == (0, 0):
        add_items(project, [NewItem(m, (), "typed") for m in fresh.values()])
    else:
        add_split_prompts(project, fresh, "typed", share)
    return len(fresh)


@require_POST
@project_page(Role.ADMIN)
def held_out(request: ProjectRequest, prompt_id: int) -> HttpResponse:
    """Holds a prompt out of training, or gives it back; not once it has been judged."""
    prompt = Prompt.objects.filter(project=request.project, pk=prompt_id).first()
    if prompt is None:
        raise Http404("there is no such prompt")
    if Item.objects.filter(prompt=prompt).exists():
        messages.error(request, "This prompt is in an item already; it stays where it is.")
    else:
        prompt.held_out = not prompt.held_out
        prompt.save(update_fields=["held_out"])
        audit.record(
            "prompt.held_out" if prompt.held_out else "prompt.given_back",
            user=request.user,
            project=request.project,
            target=prompt.pk,
        )
    return redirect("prompts", request.project.slug)
