"""Pages of trainings: the form, the list, and one run while it trains."""

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, has_rank, project_page
from openpalm.feedback.accounts.errors import sentence
from openpalm.feedback.loop import plots
from openpalm.feedback.loop.figures import Figures, rows
from openpalm.feedback.loop.forms import ABOUT, VERBS, TrainForm
from openpalm.feedback.loop.pages import live_page, page, refused
from openpalm.feedback.manage.pages import find
from openpalm.feedback.models import Job, ModelVersion, Role, TrainRun
from openpalm.feedback.paging import page_of
from openpalm.feedback.quality import names
from openpalm.feedback.training import runs
from openpalm.feedback.worker.processes import last_lines

LOG_LINES = 30


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def train(request: ProjectRequest) -> HttpResponse:
    """Starts a training: freezes the judgements and queues the command."""
    project = request.project
    verb = request.GET.get("verb", "reward")
    verb = verb if verb in VERBS else "reward"
    figures = Figures(project, names.LABELERS)
    form = TrainForm(
        request.POST or None, project=project, verb=verb, counted=judgements_by_kind(figures)
    )
    if request.method == "POST" and form.is_valid():
        try:
            run = runs.start(
                project,
                verb,
                request.user,
                parent=form.cleaned_data["parent"],
                chosen=form.chosen(),
                settings=form.settings(),
                reward=form.cleaned_data.get("reward"),
            )
        except DataError as error:
            form.add_error(None, sentence(error))
        else:
            messages.success(request, f"{VERBS[verb]}: the training is queued.")
            return redirect("run", project.slug, run.pk)
    return page(
        request,
        "train",
        form=form,
        verb=verb,
        verbs=VERBS,
        about=ABOUT[verb],
        computed_at=figures.computed_at,
        lacks=_lacks(form),
        status=422 if form.errors else 200,
    )


def judgements_by_kind(figures: Figures) -> dict[str, int]:
    """Judgements by kind of author, as the worker counted them."""
    counted: dict[str, int] = {}
    for row in rows(figures.value(names.LABELERS).get("rows")):
        kind = str(row.get("author_kind"))
        counted[kind] = counted.get(kind, 0) + int(row.get("judgements") or 0)
    return counted


def _lacks(form: TrainForm) -> str:
    """What is missing before anything can be trained."""
    parent: Any = form.fields["parent"]
    if not parent.queryset.exists():
        return "model"
    reward: Any = form.fields.get("reward")
    return "reward" if reward is not None and not reward.queryset.exists() else ""


@require_GET
@project_page(Role.REVIEWER)
def run_list(request: ProjectRequest) -> HttpResponse:
    found = TrainRun.objects.filter(project=request.project)
    found = found.select_related("parent", "snapshot", "created_by").defer("curve")
    return page(request, "runs", page=page_of(found, request, 20), verbs=VERBS)


@require_GET
@project_page(Role.REVIEWER)
def run(request: ProjectRequest, run_id: int) -> HttpResponse:
    """With htmx, only the part that reloads until the run has ended."""
    row = find(
        TrainRun.objects.select_related("parent", "snapshot", "reward_model", "created_by"),
        run_id,
        request,
    )
    job = Job.objects.filter(project=request.project, kind="train", arguments__run=row.pk)
    is_admin = has_rank(request.role, Role.ADMIN)
    return live_page(
        request,
        "run",
        state=row.state,
        run=row,
        title=VERBS.get(row.verb, row.verb),
        job=job.order_by("-id").first(),
        is_unfinished=row.state in TrainRun.UNFINISHED,
        made=list(ModelVersion.objects.filter(run=row).order_by("id")),
        plot=plots.curve(row.curve, "reward" if row.verb == "ppo" else "loss"),
        curve_name="Reward" if row.verb == "ppo" else "Loss",
        figures=shown_figures(row.figures),
        settings=shown_settings(row.settings),
        log=last_lines(runs.log_file(row))[-LOG_LINES:] if is_admin else [],
        # Only admins see paths on the server.
        error=row.error if is_admin else row.error.partition(" (log: ")[0],
    )


def shown_figures(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The last figures in words, those of validation named so."""
    found = []
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            words = name.replace("_per_s", " per second").replace("_s", " (s)").replace("_", " ")
            words = words.replace("val ", "validation ").replace("kl", "KL")
            found.append((words, f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"))
    return found


def shown_settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in settings.items() if k not in ("filter", "reward_run")]


@require_POST
@project_page(Role.ADMIN)
def run_stop(request: ProjectRequest, run_id: int) -> HttpResponse:
    row = find(TrainRun.objects.all(), run_id, request)
    if runs.stop(row, request.user):
        messages.success(request, "The training saves what it has and ends.")
    else:
        messages.info(request, "This training has ended already.")
    return redirect("run", request.project.slug, row.pk)


@require_POST
@project_page(Role.ADMIN)
def run_resume(request: ProjectRequest, run_id: int) -> HttpResponse:
    row = find(TrainRun.objects.all(), run_id, request)
    try:
        runs.resume(row, request.user)
    except DataError as error:
        return refused(request, sentence(error), "run", request.project.slug, row.pk)
    messages.success(
        request, "The training waits for the worker, and continues from its last save."
    )
    return redirect("run", request.project.slug, row.pk)
