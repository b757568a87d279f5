"""/api/v1/runs and /api/v1/models: training runs and the models that the project knows."""

from typing import Any

from django.http import JsonResponse

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import has_rank
from openpalm.feedback.api.json_forms import job_json, model_json, run_json, snapshot_json
from openpalm.feedback.api.protocol.endpoints import Call, each, operation
from openpalm.feedback.api.protocol.errors import ApiError, refusals
from openpalm.feedback.api.responses import shown_responses
from openpalm.feedback.models import (
    ModelVersion,
    Project,
    Role,
    Snapshot,
    SnapshotJudgement,
    TrainRun,
)
from openpalm.feedback.training import promotion, registry, runs, scoring
from openpalm.feedback.training.commands import OWN_OPTIONS, VERBS
from openpalm.feedback.training.lineage import ancestors, snapshots_of
from openpalm.feedback.training.snapshots import Filter, default_filter

SETTABLE = {"members", "name"}
"""of the settings that are no options of the command"""
MODELS = ModelVersion.objects.select_related("project", "parent")
RUNS = TrainRun.objects.select_related("snapshot", "parent", "reward_model")


@operation("runs:read", Role.REVIEWER)
def list_runs(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    found = RUNS.filter(project=project).defer("curve")
    return call.page(found, each(lambda run: _shown(call, run)))


def _shown(call: Call, run: TrainRun) -> dict[str, Any]:
    return run_json(run, is_admin=has_rank(call.role, Role.ADMIN))


@operation("runs:read", Role.REVIEWER)
def get_run(call: Call, run_id: int) -> JsonResponse:
    run = call.find(RUNS.filter(pk=run_id), "run")
    call.finish()
    return JsonResponse(_shown(call, run))


@operation("runs:write", Role.ADMIN)
def start_run(call: Call) -> JsonResponse:
    """Queues a training on the judgements of now; the worker runs it."""
    body = call.body
    project, _ = call.enter(body.text("project", most=60))
    verb = body.choice("verb", VERBS)
    parent = model_named(call, project, "parent")
    reward = model_named(call, project, "reward_model") if body.has("reward_model") else None
    usual = default_filter(project, verb)
    kinds = body.texts("author_kinds", most=3, length=16, default=list(usual.author_kinds))
    hold_back = body.flag("hold_back", usual.hold_back)
    compared = body.flag("comparisons", usual.comparisons)
    settings = body.group("settings", 4000, {})
    for name in set(settings) & (set(OWN_OPTIONS) - SETTABLE):
        body.fail(f"settings.{name}", "cannot be set here")
    call.finish()
    run = runs.start(
        project,
        verb,
        call.user,
        parent=parent,
        chosen=Filter(author_kinds=kinds, hold_back=hold_back, comparisons=compared),
        settings=settings,
        reward=reward,
    )
    return JsonResponse(_shown(call, run), status=201)


@operation("runs:write", Role.ADMIN)
def stop_run(call: Call, run_id: int) -> JsonResponse:
    """Lets a training save and end."""
    run = call.find(RUNS.filter(pk=run_id), "run")
    call.finish()
    if not runs.stop(run, call.user):
        raise ApiError(409, f"the run is {run.state}; it cannot be stopped")
    run.refresh_from_db()
    return JsonResponse(_shown(call, run))


@operation("runs:write", Role.ADMIN)
def resume_run(call: Call, run_id: int) -> JsonResponse:
    """Continues a training that was stopped or failed from its last save."""
    run = call.find(RUNS.filter(pk=run_id), "run")
    call.finish()
    with refusals():
        runs.resume(run, call.user)
    run.refresh_from_db()
    return JsonResponse(_shown(call, run), status=202)


@operation("models:read", Role.REVIEWER)
def list_models(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    return call.page(MODELS.filter(project=project), each(model_json))


@operation("models:read", Role.REVIEWER)
def get_model(call: Call, model_id: int) -> JsonResponse:
    """With what it was trained from, and the judgements that it was trained on, by snapshot."""
    model = call.find(MODELS.filter(pk=model_id), "model")
    call.finish()
    lineage = {
        "ancestors": [each.name for each in ancestors(model)[1:]],
        "snapshots": [snapshot_json(each) for each in snapshots_of(model)],
    }
    return JsonResponse(model_json(model) | lineage)


@operation("models:read", Role.REVIEWER)
def list_snapshot_judgements(call: Call, snapshot_id: int) -> JsonResponse:
    """The judgements that a snapshot froze, as they are now."""
    snapshot = call.find(Snapshot.objects.filter(pk=snapshot_id), "snapshot")
    rows = SnapshotJudgement.objects.filter(snapshot=snapshot)
    rows = rows.select_related("response__user", "response__item")
    return call.page(rows, lambda found: shown_responses(call, [row.response for row in found]))


@operation("models:write", Role.ADMIN)
def register_model(call: Call) -> JsonResponse:
    """Adds a checkpoint on the server's disk; only an administrator of the site may."""
    body = call.body
    project, _ = call.enter(body.text("project", most=60))
    if not call.user.is_superuser:
        raise ApiError(403, "only an administrator of the site adds a model by its path")
    path = body.text("path", most=500)
    name = body.text("name", most=80)
    kind = body.choice("kind", ModelVersion.Kind.values, ModelVersion.Kind.POLICY)
    call.finish()
    try:
        model = registry.add_by_path(project, call.user, path, name=name, kind=kind)
    except DataError as error:
        body.fail("path", f"{error}")
    return JsonResponse(model_json(model), status=201)


@operation("models:write", Role.ADMIN)
def choose_model(call: Call, model_id: int) -> JsonResponse:
    """Names the first served model of a project without a model server."""
    model = call.find(MODELS.filter(pk=model_id), "model")
    call.finish()
    with refusals():
        promotion.choose(model.project, model, call.user)
    model.project.refresh_from_db(fields=["served"])
    return JsonResponse(model_json(model))


@operation("models:write", Role.ADMIN)
def score_model(call: Call, model_id: int) -> JsonResponse:
    """Queues the scoring of all answers by a reward model."""
    model = call.find(MODELS.filter(pk=model_id), "model")
    call.finish()
    with refusals():
        job = scoring.start(model, call.user)
    return JsonResponse(job_json(job), status=202)


def model_named(call: Call, project: Project, field: str) -> ModelVersion:
    name = call.body.text(field, most=120)
    found = ModelVersion.objects.filter(project=project, name=name).first()
    if found is None:
        call.body.fail(field, "the project has no model of this name")
    return found
