"""The form that lets models answer prompts, so that people can judge the answers."""

from typing import Any

from django import forms
from django.contrib import messages
from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_http_methods

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.forms import PlainLabels
from openpalm.feedback.manage.pages import page
from openpalm.feedback.models import ModelVersion, Project, Role
from openpalm.feedback.training import generation
from openpalm.feedback.training.answers import DEFAULT_SAMPLING


class GenerateForm(PlainLabels, forms.Form):
    """Which models answer how many prompts, in one or two ways of sampling."""

    models = forms.ModelMultipleChoiceField(
        ModelVersion.objects.none(), widget=forms.CheckboxSelectMultiple
    )
    count = forms.IntegerField(
        label="Prompts",
        min_value=1,
        max_value=generation.MOST_PROMPTS,
        initial=generation.PROMPTS,
        help_text="The oldest prompts that have no item yet; never held-out ones.",
    )
    n = forms.IntegerField(
        label="Answers of each model and sampling",
        min_value=1,
        max_value=generation.MOST_ANSWERS,
        initial=generation.ANSWERS,
    )
    temperature = forms.FloatField(
        min_value=0, max_value=2, initial=DEFAULT_SAMPLING["temperature"]
    )
    second_temperature = forms.FloatField(
        label="Second temperature (optional)", min_value=0, max_value=2, required=False
    )
    top_p = forms.FloatField(label="Top-p", min_value=0.01, max_value=1, initial=1.0)
    max_tokens = forms.IntegerField(
        label="Most tokens of an answer",
        min_value=1,
        max_value=4096,
        initial=DEFAULT_SAMPLING["max_tokens"],
    )
    pairs = forms.IntegerField(
        label="Most items of one prompt", min_value=1, max_value=generation.MOST_ITEMS, initial=1
    )

    def __init__(self, *args: Any, project: Project, **names: Any) -> None:
        super().__init__(*args, **names)
        field: Any = self.fields["models"]
        field.queryset = policies(project)
        field.initial = [project.served_id] if project.served_id else []

    def wanted(self) -> list[dict[str, Any]]:
        """The models as the job wants them: one entry for each way of sampling."""
        given = self.cleaned_data
        temperatures = {given["temperature"], given["second_temperature"]} - {None}
        return [
            {
                "model": model.pk,
                "n": given["n"],
                "temperature": temperature,
                "top_p": given["top_p"],
                "max_tokens": given["max_tokens"],
            }
            for model in given["models"]
            for temperature in sorted(temperatures)
        ]


def policies(project: Project) -> "QuerySet[ModelVersion]":
    """The project's models that can answer."""
    found = ModelVersion.objects.filter(project=project, kind=ModelVersion.Kind.POLICY)
    return found.exclude(path="").order_by("-id")


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def generate(request: ProjectRequest) -> HttpResponse:
    project = request.project
    form = GenerateForm(request.POST or None, project=project)
    if request.method == "POST" and form.is_valid():
        count = form.cleaned_data["count"]
        prompts = list(generation.unused_prompts(project).values_list("pk", flat=True)[:count])
        try:
            generation.start(
                project,
                request.user,
                form.wanted(),
                prompts=prompts,
                pairs=form.cleaned_data["pairs"],
            )
        except DataError as error:
            form.add_error(None, str(error))
        else:
            messages.success(request, f"The models answer {len(prompts)} prompts now.")
            return redirect("jobs", project.slug)
    return page(
        request,
        "generate",
        form=form,
        has_models=policies(project).exists(),
        waiting=len(
            generation.unused_prompts(project).values_list("pk")[: generation.MOST_PROMPTS + 1]
        ),
        limit=generation.MOST_PROMPTS,
        status=422 if form.errors else 200,
    )
