"""Pages of models: all of them as a tree, one with its lineage, and what a snapshot holds."""

from collections.abc import Sequence

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.errors import DataError, OpenPalmError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.errors import sentence
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.judgements.words import describe
from openpalm.feedback.loop.forms import CompareForm, RegisterForm
from openpalm.feedback.loop.pages import page, refused
from openpalm.feedback.manage.pages import find
from openpalm.feedback.model_server import site_server
from openpalm.feedback.models import (
    Comparison,
    ModelVersion,
    Promotion,
    Role,
    Snapshot,
    SnapshotJudgement,
    TrainRun,
)
from openpalm.feedback.paging import page_of
from openpalm.feedback.training import promotion, scoring
from openpalm.feedback.training.lineage import ancestors, snapshots_of
from openpalm.feedback.training.registry import POLICY, add_by_path

MODELS_ON_A_PAGE = 100
MAX_DEPTH = 6
"""of the indents of the tree"""


@require_GET
@project_page(Role.REVIEWER)
def models(request: ProjectRequest) -> HttpResponse:
    found = ModelVersion.objects.filter(project=request.project)
    found = found.select_related("parent", "run__snapshot", "run__reward_model")
    listed = page_of(found, request, MODELS_ON_A_PAGE)
    promotions = Promotion.objects.filter(project=request.project).order_by("-id")
    return page(
        request,
        "models",
        page=listed,
        rows=tree(listed.rows),
        promotions=list(promotions.select_related("model", "previous", "by", "comparison")[:20]),
        has_server=site_server() is not None,
    )


def tree(found: Sequence[ModelVersion]) -> list[tuple[int, ModelVersion]]:
    """(depth, model): each below its parent if that is listed too, the oldest first."""
    listed = {model.pk for model in found}
    children: dict[int | None, list[ModelVersion]] = {}
    for model in sorted(found, key=lambda model: model.pk):
        parent = model.parent_id if model.parent_id in listed else None
        children.setdefault(parent, []).append(model)
    ordered: list[tuple[int, ModelVersion]] = []
    waiting = [(0, model) for model in reversed(children.get(None, []))]
    while waiting:
        depth, model = waiting.pop()
        ordered.append((min(depth, MAX_DEPTH), model))
        waiting += [(depth + 1, child) for child in reversed(children.pop(model.pk, []))]
    return ordered


@require_GET
@project_page(Role.REVIEWER)
def model(request: ProjectRequest, model_id: int) -> HttpResponse:
    project = request.project
    rows = ModelVersion.objects.select_related("parent", "run__snapshot", "run__reward_model")
    row = find(rows, model_id, request)
    compared = Comparison.objects.filter(project=project, challenger=row)
    promoted = Promotion.objects.filter(project=project, model=row)
    runs = TrainRun.objects.filter(project=project, parent=row)
    is_policy = row.kind == POLICY
    return page(
        request,
        "model",
        model=row,
        is_policy=is_policy,
        is_served=row.pk == project.served_id,
        ancestors=ancestors(row)[1:],
        snapshots=snapshots_of(row),
        comparisons=list(compared.select_related("served").order_by("-id")[:10]),
        promotions=list(promoted.select_related("by", "previous").order_by("-id")[:10]),
        trained=list(runs.defer("curve").order_by("-id")[:20]),
        compare_form=CompareForm(),
        can_compare=is_policy and project.served_id not in (None, row.pk) and bool(row.path),
        can_choose=promotion.can_choose(project, row),
        refusal=promotion.refusal(None, row),
    )


@require_POST
@project_page(Role.ADMIN)
def model_choose(request: ProjectRequest, model_id: int) -> HttpResponse:
    """Names the first served model, which later ones are compared with."""
    slug = request.project.slug
    row = find(ModelVersion.objects.all(), model_id, request)
    try:
        promotion.choose(request.project, row, request.user)
    except DataError as error:
        return refused(request, sentence(error), "model", slug, row.pk)
    messages.success(request, f"Models are compared with {row.name} from now on.")
    return redirect("model", slug, row.pk)


@require_POST
@project_page(Role.ADMIN)
def model_score(request: ProjectRequest, model_id: int) -> HttpResponse:
    """Scores all answers with a reward model."""
    slug = request.project.slug
    row = find(ModelVersion.objects.all(), model_id, request)
    try:
        scoring.start(row, request.user)
    except DataError as error:
        return refused(request, sentence(error), "model", slug, row.pk)
    messages.success(request, f"{row.name} scores the answers that have no score of it yet.")
    return redirect("model", slug, row.pk)


@require_http_methods(["GET", "POST"])
@project_page(Role.ADMIN)
def model_new(request: ProjectRequest) -> HttpResponse:
    """Adds a checkpoint by its path; only an administrator of the site may."""
    form = RegisterForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            given = form.cleaned_data
            row = add_by_path(
                request.project,
                request.user,
                given["path"],
                name=given["name"],
                kind=given["kind"],
            )
        except OpenPalmError as error:
            form.add_error("path", str(error))
        else:
            messages.success(request, f"The project knows {row.name} now.")
            return redirect("model", request.project.slug, row.pk)
    return page(request, "model_new", form=form, status=422 if form.errors else 200)


@require_GET
@project_page(Role.REVIEWER)
def snapshot(request: ProjectRequest, snapshot_id: int) -> HttpResponse:
    """What a snapshot holds, down to each judgement."""
    row = find(Snapshot.objects.select_related("created_by"), snapshot_id, request)
    rows = SnapshotJudgement.objects.filter(snapshot=row)
    listed = page_of(rows.select_related("response__user", "response__item"), request)
    responses = [each.response for each in listed.rows]
    visible = revealed({each.item_id: each.item for each in responses}.values(), request.user)
    made = ModelVersion.objects.filter(project=request.project, run__snapshot=row)
    return page(
        request,
        "snapshot",
        snapshot=row,
        page=listed,
        rows=[(each, describe(each) if each.item_id in visible else None) for each in responses],
        models=list(made.order_by("id")[:50]),
    )
