"""/api/v1/runs and /api/v1/models: training runs and the models that the project knows."""

from django.http import JsonResponse

from openpalm.feedback.api.endpoints import Call, operation
from openpalm.feedback.api.errors import ApiError
from openpalm.feedback.api.json_forms import model_json, run_json
from openpalm.feedback.models import ModelVersion, Role, TrainRun


@operation("runs:read", Role.REVIEWER)
def list_runs(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    runs = TrainRun.objects.filter(project=project)
    return call.page(runs.select_related("snapshot", "parent", "reward_model"), run_json)


@operation("runs:read", Role.REVIEWER)
def get_run(call: Call, run_id: int) -> JsonResponse:
    run = TrainRun.objects.select_related("project").filter(pk=run_id).first()
    if run is None:
        raise ApiError(404, "there is no such run, or you are not a member of its project")
    call.enter(run.project.slug)
    call.finish()
    return JsonResponse(run_json(run))


@operation("models:read", Role.REVIEWER)
def list_models(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    models = ModelVersion.objects.filter(project=project)
    return call.page(models.select_related("parent", "project"), model_json)


@operation("models:read", Role.REVIEWER)
def get_model(call: Call, model_id: int) -> JsonResponse:
    model = ModelVersion.objects.select_related("project").filter(pk=model_id).first()
    if model is None:
        raise ApiError(404, "there is no such model, or you are not a member of its project")
    call.enter(model.project.slug)
    call.finish()
    return JsonResponse(model_json(model))
