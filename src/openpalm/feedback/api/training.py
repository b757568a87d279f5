"""/api/v1/runs and /api/v1/models: training runs and the models that the project knows."""

from django.http import JsonResponse

from openpalm.errors import DataError
from openpalm.feedback.api.endpoints import Call, each, operation
from openpalm.feedback.api.errors import ApiError
from openpalm.feedback.api.json_forms import model_json, run_json
from openpalm.feedback.models import (
    Comparison,
    ModelVersion,
    Project,
    Role,
    TrainRun,
    User,
)
from openpalm.feedback.paging import MAX_ID
from openpalm.feedback.training import promotion, runs
from openpalm.feedback.training.commands import OWN_OPTIONS, VERBS
from openpalm.feedback.training.snapshots import Filter

SETTABLE = {"members", "name"}
"""of the settings that are no options of the command"""


@operation("runs:read", Role.REVIEWER)
def list_runs(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    found = TrainRun.objects.filter(project=project)
    return call.page(
        found.select_related("snapshot", "parent", "reward_model"),
        each(run_json),
    )


@operation("runs:read", Role.REVIEWER)
def get_run(call: Call, run_id: int) -> JsonResponse:
    run = _run(call, run_id)
    call.finish()
    return JsonResponse(run_json(run))


@operation("runs:write", Role.ADMIN)
def start_run(call: Call) -> JsonResponse:
    """Queues a training on the judgements of now; the worker runs it."""
    body = call.body
    project, _ = call.enter(body.text("project", most=60))
    verb = body.choice("verb", VERBS)
    parent = _model_named(call, project, "parent")
    reward = _model_named(call, project, "reward_model") if body.has("reward_model") else None
    kinds = body.texts("author_kinds", most=3, length=16, default=[User.Kind.PERSON])
    # As in the form of the page.
    hold_back = body.flag("hold_back", verb == "reward")
    settings = body.group("settings", 4000, {})
    for name in set(settings) & (set(OWN_OPTIONS) - SETTABLE):
        body.fail(f"settings.{name}", "cannot be set here")
    call.finish()
    run = runs.start(
        project,
        verb,
        call.user,
        parent=parent,
        chosen=Filter(author_kinds=kinds, hold_back=hold_back),
        settings=settings,
        reward=reward,
    )
    return JsonResponse(run_json(run), status=201)


@operation("runs:write", Role.ADMIN)
def stop_run(call: Call, run_id: int) -> JsonResponse:
    """Lets a training save and end."""
    run = _run(call, run_id)
    call.finish()
    if not runs.stop(run, call.user):
        raise ApiError(409, f"the run is {run.state}; it cannot be stopped")
    run.refresh_from_db()
    return JsonResponse(run_json(run))


def _run(call: Call, run_id: int) -> TrainRun:
    run = TrainRun.objects.select_related("project").filter(pk=run_id).first()
    if run is None:
        raise ApiError(404, "there is no such run, or you are not a member of its project")
    call.enter(run.project.slug)
    return run


@operation("models:read", Role.REVIEWER)
def list_models(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    models = ModelVersion.objects.filter(project=project)
    return call.page(models.select_related("parent", "project"), each(model_json))


@operation("models:read", Role.REVIEWER)
def get_model(call: Call, model_id: int) -> JsonResponse:
    model = _model(call, model_id)
    call.finish()
    return JsonResponse(model_json(model))


@operation("models:write", Role.ADMIN)
def promote(call: Call, model_id: int) -> JsonResponse:
    """Queues the promotion after a decided comparison, or with an `override_reason`."""
    model = _model(call, model_id)
    number = call.body.whole("comparison", 1, MAX_ID, None)
    reason = call.body.text("override_reason", most=2000, default="")
    call.finish()
    comparison = None
    if number is not None:
        comparison = Comparison.objects.filter(pk=number, project=model.project).first()
        if comparison is None:
            call.body.fail("comparison", "the project has no such comparison")
    try:
        made = promotion.propose(
            model.project, model, call.user, comparison=comparison, override_reason=reason
        )
    except DataError as error:
        raise ApiError(409, f"{error}") from None
    return JsonResponse({"id": made.pk, "model": model.pk, "state": made.state}, status=202)


def _model(call: Call, model_id: int) -> ModelVersion:
    model = ModelVersion.objects.select_related("project", "parent").filter(pk=model_id).first()
    if model is None:
        raise ApiError(404, "there is no such model, or you are not a member of its project")
    call.enter(model.project.slug)
    return model


def _model_named(call: Call, project: Project, field: str) -> ModelVersion:
    name = call.body.text(field, most=120)
    found = ModelVersion.objects.filter(project=project, name=name).first()
    if found is None:
        call.body.fail(field, "the project has no model of this name")
    return found
