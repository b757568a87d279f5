"""The loop page: the circle, agreement beside its ceiling, calibration, disagreements, alarms."""

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, has_rank, project_page
from openpalm.feedback.loop import plots
from openpalm.feedback.loop.figures import Figures, estimate, rows
from openpalm.feedback.loop.forms import BatchForm
from openpalm.feedback.loop.pages import page, refused
from openpalm.feedback.loop.stations import newest, stations
from openpalm.feedback.manage.overview import item_counts
from openpalm.feedback.models import Item, Job, ModelVersion, Project, Role, Task, TrainRun
from openpalm.feedback.worker import jobs

SHOWN_MODELS = 12
SHOWN_DISAGREEMENTS = 12
RUNS_WITH_ALARMS = 20
"""as many of the newest runs are looked through"""


@require_GET
@project_page(Role.REVIEWER)
def loop(request: ProjectRequest) -> HttpResponse:
    project = request.project
    figures = Figures(project)
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
        agreements=agreements(project, figures),
        disagreements=disagreements(figures),
        alarms=alarms(project),
        batch=last_batch(project),
        batch_form=BatchForm(),
        can_select=project.task == Task.PAIR,
    )


def agreements(project: Project, figures: Figures) -> list[dict[str, Any]]:
    """For each kind of author: the reward models, the newest first, and the ceiling."""
    found = []
    names = dict(
        ModelVersion.objects.filter(project=project, kind=ModelVersion.Kind.REWARD)
        .order_by("-id")
        .values_list("id", "name")[:200]
    )
    for kind in figures.kinds("reward_agreement", "agreement"):
        if kind == "model":
            continue  # judges that are models are measured on the page of quality
        ceiling = estimate(figures.of("agreement", kind).get("decided"))
        models = [
            _trend_row(row, names, ceiling)
            for row in rows(figures.of("reward_agreement", kind).get("models"))
            if row.get("model") in names
        ]
        models.sort(key=lambda row: -row["id"])
        calibration = figures.of("calibration", kind)
        found.append(
            {
                "kind": kind,
                "newest": next((row for row in models if row["accuracy"]), None),
                "models": models[:SHOWN_MODELS],
                "ceiling": ceiling,
                "ceiling_words": plots.in_words(ceiling),
                "ceiling_plot": plots.interval(ceiling),
                "calibration": calibration,
                "calibration_plot": plots.calibration(rows(calibration.get("bins"))),
                "calibrated": names.get(calibration.get("model", 0)),
            }
        )
    return found


def _trend_row(
    row: Mapping[str, Any], names: Mapping[int, str], ceiling: Mapping[str, float] | None
) -> dict[str, Any]:
    accuracy = estimate(row.get("accuracy"))
    references = [0.5, ceiling["value"]] if ceiling else [0.5]
    return {
        "id": row["model"],
        "name": names[row["model"]],
        "accuracy": accuracy,
        "judgements": row.get("judgements"),
        "words": plots.in_words(accuracy),
        "plot": plots.interval(accuracy, references=references),
    }


def disagreements(figures: Figures) -> list[dict[str, Any]]:
    """Items at which the reward model is surest of what people did not choose."""
    listed = rows(figures.value("disagreements").get("rows"))[:SHOWN_DISAGREEMENTS]
    ids = [row["item"] for row in listed if isinstance(row.get("item"), int)]
    items = Item.objects.filter(pk__in=ids).select_related("prompt").in_bulk()
    return [
        {"item": items[row["item"]], "margin": row.get("margin")}
        for row in listed
        if row.get("item") in items
    ]


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
    if project.task != Task.PAIR:
        return refused(request, "Only a project of pairs has batches.", "loop", project.slug)
    size = form.cleaned_data["size"]
    job = jobs.enqueue("select", project=project, user=request.user, size=size)
    audit.record("job.select", user=request.user, project=project, target=job.pk, size=size)
    messages.success(request, f"The worker chooses {size} pairs now.")
    return redirect("loop", project.slug)
