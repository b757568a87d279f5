"""The loop page: the circle, agreement and its ceiling, calibration, disagreements, alarms."""

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, has_rank, project_page
from openpalm.feedback.accounts.errors import sentence
from openpalm.feedback.loop import plots
from openpalm.feedback.loop.figures import LOOP, Figures, estimate, rows
from openpalm.feedback.loop.forms import BatchForm
from openpalm.feedback.loop.pages import page, refused
from openpalm.feedback.loop.stations import newest, stations
from openpalm.feedback.manage.overview import item_counts
from openpalm.feedback.models import Item, Job, Project, Role, Task, TrainRun
from openpalm.feedback.quality import names
from openpalm.feedback.training import selection

SHOWN_MODELS = 12
SHOWN_DISAGREEMENTS = 12
RUNS_WITH_ALARMS = 20
"""newest runs that are searched for alarms"""


@require_GET
@project_page(Role.REVIEWER)
def loop(request: ProjectRequest) -> HttpResponse:
    project = request.project
    figures = Figures(project, *LOOP)
    known = newest(project)
    circle = stations(project, item_counts(project), figures, known)
    for station in circle:
        if not has_rank(request.role, station.least):
            station.action = ""
    return page(
        request,
        "loop",
        stations=circle,
        computed_at=figures.computed_at,
        agreements=agreements(figures),
        disagreements=disagreements(project, figures),
        alarms=alarms(project),
        model_alarms=rows(figures.value(names.ALARMS).get("rows")),
        batch=last_batch(project),
        batch_form=BatchForm(),
        can_select=project.task == Task.PAIR,
    )


def agreements(figures: Figures) -> list[dict[str, Any]]:
    """For each kind of labelers: the reward models, the newest first, and the ceiling."""
    found = []
    for kind in figures.kinds(names.REWARD_AGREEMENT):
        row = figures.of(names.REWARD_AGREEMENT, kind)
        ceiling = estimate(row.get("people")) or estimate(
            figures.of(names.AGREEMENT, kind).get("decided")
        )
        limit = estimate(row.get("limit"))
        models = [_trend_row(each, ceiling) for each in rows(row.get("models"))]
        models.sort(key=lambda each: -each["model"])
        calibration = figures.of(names.CALIBRATION, kind)
        found.append(
            {
                "kind": kind,
                "is_random": row.get("arm") == "random",
                "newest": next((each for each in models if each["accuracy"]), None),
                "models": models[:SHOWN_MODELS],
                "ceiling": ceiling,
                "ceiling_words": plots.in_words(ceiling) if ceiling else "",
                "ceiling_plot": plots.interval(ceiling),
                "limit": plots.in_words(limit) if limit else "",
                "calibration": calibration,
                "calibration_plot": plots.calibration(rows(calibration.get("bins"))),
            }
        )
    return found


def _trend_row(row: Mapping[str, Any], ceiling: Mapping[str, float] | None) -> dict[str, Any]:
    accuracy = estimate(row.get("accuracy"))
    references = [0.5, ceiling["value"]] if ceiling else [0.5]
    return {
        **row,
        "accuracy": accuracy,
        "words": plots.in_words(accuracy) if accuracy else row.get("reason"),
        "plot": plots.interval(accuracy, references=references),
    }


def disagreements(project: Project, figures: Figures) -> dict[str, Any]:
    """Items where the reward model is surest of an answer that labelers did not choose.

    The sides are not shown: somebody who may still judge the item must not see them.
    """
    found = figures.value(names.DISAGREEMENTS)
    listed = rows(found.get("rows"))[:SHOWN_DISAGREEMENTS]
    ids = [row["item"] for row in listed if isinstance(row.get("item"), int)]
    items = Item.objects.filter(project=project).select_related("prompt").in_bulk(ids)
    shown = [
        {"item": items[row["item"]], "margin": abs(row["margin"]), "number": row.get("judgements")}
        for row in listed
        if row.get("item") in items and isinstance(row.get("margin"), (int, float))
    ]
    return {"kind": found.get("author_kind"), "rows": shown}


def alarms(project: Project) -> list[TrainRun]:
    """The newest runs that raised an alarm."""
    recent = TrainRun.objects.filter(project=project).order_by("-id")[:RUNS_WITH_ALARMS]
    return [run for run in recent if run.alarms]


def last_batch(project: Project) -> Job | None:
    return Job.objects.filter(project=project, kind="select").order_by("-id").first()


@require_POST
@project_page(Role.ADMIN)
def next_batch(request: ProjectRequest) -> HttpResponse:
    """Queues the choice of the next pairs to judge."""
    project, form = request.project, BatchForm(request.POST)
    if not form.is_valid():
        return refused(request, f"Pairs: {form.errors['size'][0]}", "loop", project.slug)
    size = form.cleaned_data["size"]
    try:
        selection.start(project, request.user, size)
    except DataError as error:
        return refused(request, sentence(error), "loop", project.slug)
    messages.success(request, f"The worker chooses {size} pairs now.")
    return redirect("loop", project.slug)
