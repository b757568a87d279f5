"""Work for the worker over the API: generated answers, the next batch, jobs; stored figures."""

from typing import Any

from django.http import JsonResponse

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.api.json_forms import job_json
from openpalm.feedback.api.protocol.endpoints import Call, each, operation
from openpalm.feedback.api.protocol.errors import ApiError, refusals
from openpalm.feedback.api.protocol.fields import Fields
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.models import Item, Job, ModelVersion, Project, Prompt, Role, Statistic, User
from openpalm.feedback.paging import MAX_ID
from openpalm.feedback.quality import names
from openpalm.feedback.training import generation, selection
from openpalm.feedback.training.answers import DEFAULT_SAMPLING, check_sampling
from openpalm.feedback.worker import jobs

MAX_MODELS = 20
FIGURES = sorted(value for name, value in vars(names).items() if name.isupper())


@operation("items:write", Role.ADMIN)
def generate_answers(call: Call, slug: str) -> JsonResponse:
    """Queues answers of models to prompts, and the items to judge them.

    Without `prompts`: the `count` oldest prompts that have no item yet, never held-out ones.
    """
    project, _ = call.enter(slug)
    given = call.body.objects("models", least=1, most=MAX_MODELS)
    pairs = call.body.whole("pairs", 1, generation.MOST_ITEMS, 1)
    ids = call.body.wholes("prompts", most=generation.MOST_PROMPTS, high=MAX_ID, default=None)
    count = call.body.whole("count", 1, generation.MOST_PROMPTS, None)
    call.finish()
    if ids is None:
        unused = generation.unused_prompts(project).values_list("pk", flat=True)
        ids = list(unused[: count or generation.PROMPTS])
    elif count is not None:
        call.body.fail("count", "give prompts or count, not both")
    else:
        _check_prompts(call, project, ids)
    known = {model.name: model.pk for model in ModelVersion.objects.filter(project=project)}
    models = [_wanted(one, known) for one in given]
    with refusals():
        job = generation.start(project, call.user, models, prompts=ids, pairs=pairs)
    return JsonResponse(job_json(job), status=202)


def _check_prompts(call: Call, project: Project, ids: list[int]) -> None:
    usable = Prompt.objects.filter(project=project, held_out=False)
    found = {pk for at in range(0, len(ids), 500) for pk in _among(usable, ids[at : at + 500])}
    if missing := [pk for pk in ids if pk not in found]:
        call.body.fail("prompts", f"the project has no prompt {missing[0]}, or it is held out")


def _among(prompts: Any, ids: list[int]) -> Any:
    return prompts.filter(pk__in=ids).values_list("pk", flat=True)


def _wanted(given: Fields, known: dict[str, int]) -> dict[str, Any]:
    name = given.text("model", most=120)
    if name not in known:
        given.fail("model", "the project has no model of this name")
    n = given.whole("n", 1, generation.MOST_ANSWERS, generation.ANSWERS)
    sampling = given.group("sampling", 1000, {})
    given.finish()
    try:
        checked = check_sampling(sampling)
    except DataError as error:
        given.fail("sampling", f"{error}")
    return {"model": known[name], "n": n, **DEFAULT_SAMPLING, **checked}


@operation("items:write", Role.ADMIN)
def choose_next_batch(call: Call, slug: str) -> JsonResponse:
    """Queues the choice of the next pairs to judge: 30 % by chance, the rest active."""
    project, _ = call.enter(slug)
    size = call.body.whole("size", 1, selection.MOST_IN_BATCH, selection.BATCH_SIZE)
    call.finish()
    with refusals():
        job = selection.start(project, call.user, size)
    return JsonResponse(job_json(job), status=202)


@operation("jobs:read", Role.ADMIN)
def list_jobs(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    found = Job.objects.filter(project=project)
    if state := call.query.choice("state", Job.State.values, None):
        found = found.filter(state=state)
    return call.page(found, each(job_json))


@operation("jobs:read", Role.ADMIN)
def get_job(call: Call, job_id: int) -> JsonResponse:
    found = call.find(Job.objects.filter(pk=job_id), "job")
    call.finish()
    return JsonResponse(job_json(found))


@operation("jobs:write", Role.ADMIN)
def stop_job(call: Call, job_id: int) -> JsonResponse:
    """Stops a job; a training saves first."""
    found = call.find(Job.objects.filter(pk=job_id), "job")
    call.finish()
    if not jobs.stop(found):
        raise ApiError(409, f"the job is {found.state}; it cannot be stopped")
    target = f"{found.kind} {found.pk}"
    audit.record("job.stopped", user=call.user, project=found.project, target=target, by="api")
    found.refresh_from_db()
    return JsonResponse(job_json(found))


@operation("statistics:read", Role.REVIEWER)
def get_statistics(call: Call, slug: str) -> JsonResponse:
    """The figures that the worker has stored, each with the time it was computed."""
    project, _ = call.enter(slug)
    found = Statistic.objects.filter(project=project).order_by("name")
    if name := call.query.choice("name", FIGURES, None):
        found = found.filter(name=name)
    call.finish()
    figures = {}
    for row in found:
        value = row.value
        if row.name == names.DISAGREEMENTS:
            value = _without_sides(value, project, call.user)
        figures[row.name] = {"value": value, "computed": row.computed_at.isoformat()}
    return JsonResponse({"statistics": figures})


def _without_sides(value: dict[str, Any], project: Project, user: User) -> dict[str, Any]:
    """Hides what others chose on items that the user may still judge."""
    rows = value.get("rows", [])
    items = Item.objects.filter(project=project).in_bulk([row["item"] for row in rows])
    open_to = revealed(items.values(), user)
    shown = [
        row if row["item"] in open_to else row | {"margin": abs(row["margin"]), "people": None}
        for row in rows
    ]
    return value | {"rows": shown}
