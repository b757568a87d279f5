"""/api/v1/comparisons and /api/v1/promotions: which model is better, and which one is served."""

from django.http import JsonResponse

from openpalm.errors import DataError
from openpalm.feedback.api.json_forms import comparison_json, promotion_json
from openpalm.feedback.api.protocol.endpoints import Call, each, operation
from openpalm.feedback.api.protocol.errors import refusals
from openpalm.feedback.api.training import model_named
from openpalm.feedback.models import Comparison, ModelVersion, Promotion, Role
from openpalm.feedback.paging import MAX_ID
from openpalm.feedback.statistics.promotion import MINIMUM
from openpalm.feedback.training import comparisons, promotion
from openpalm.feedback.training.answers import DEFAULT_SAMPLING, check_sampling
from openpalm.feedback.training.comparisons import MOST_PAIRS

COMPARISONS = Comparison.objects.select_related("project", "challenger", "served")
PROMOTIONS = Promotion.objects.select_related("project", "model", "previous", "by")


@operation("comparisons:read", Role.REVIEWER)
def list_comparisons(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    return call.page(COMPARISONS.filter(project=project), each(comparison_json))


@operation("comparisons:read", Role.REVIEWER)
def get_comparison(call: Call, comparison_id: int) -> JsonResponse:
    """`refusal` says why it does not promote the challenger; null if it does."""
    found = call.find(COMPARISONS.filter(pk=comparison_id), "comparison")
    call.finish()
    why = promotion.refusal(found, found.challenger) or None
    more = {"refusal": why, "can_extend": comparisons.can_extend(found)}
    return JsonResponse(comparison_json(found) | more)


@operation("comparisons:write", Role.ADMIN)
def start_comparison(call: Call) -> JsonResponse:
    """Lets a model and the served one answer held-out prompts, for people to judge blind."""
    body = call.body
    project, _ = call.enter(body.text("project", most=60))
    challenger = model_named(call, project, "model")
    size = body.whole("size", MINIMUM, MOST_PAIRS, MINIMUM)
    given = body.group("sampling", 1000, {})
    call.finish()
    try:
        sampling = DEFAULT_SAMPLING | check_sampling(given)
    except DataError as error:
        body.fail("sampling", f"{error}")
    with refusals():
        made = comparisons.create(project, challenger, call.user, size=size, sampling=sampling)
    return JsonResponse(comparison_json(made), status=201)


@operation("comparisons:write", Role.ADMIN)
def extend_comparison(call: Call, comparison_id: int) -> JsonResponse:
    """Adds pairs to a comparison that is judged whole and undecided."""
    found = call.find(COMPARISONS.filter(pk=comparison_id), "comparison")
    further = call.body.whole("further", 1, MOST_PAIRS)
    call.finish()
    with refusals():
        extended = comparisons.extend(found, further, call.user)
    return JsonResponse(comparison_json(extended))


@operation("promotions:write", Role.ADMIN)
def promote_model(call: Call, model_id: int) -> JsonResponse:
    """Queues the promotion after a decided comparison, or with an `override_reason`."""
    model = call.find(ModelVersion.objects.filter(pk=model_id), "model")
    number = call.body.whole("comparison", 1, MAX_ID, None)
    reason = call.body.text("override_reason", most=2000, default="")
    call.finish()
    comparison = None
    if number is not None:
        comparison = COMPARISONS.filter(pk=number, project=model.project_id).first()
        if comparison is None:
            call.body.fail("comparison", "the project has no such comparison")
    with refusals():
        made = promotion.propose(
            model.project, model, call.user, comparison=comparison, override_reason=reason
        )
    return JsonResponse(promotion_json(made), status=202)


@operation("models:read", Role.REVIEWER)
def list_promotions(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    return call.page(PROMOTIONS.filter(project=project), each(promotion_json))


@operation("models:read", Role.REVIEWER)
def get_promotion(call: Call, promotion_id: int) -> JsonResponse:
    found = call.find(PROMOTIONS.filter(pk=promotion_id), "promotion")
    call.finish()
    return JsonResponse(promotion_json(found))


@operation("promotions:write", Role.ADMIN)
def undo_promotion(call: Call, promotion_id: int) -> JsonResponse:
    """Queues the return to the model that was served before."""
    found = call.find(PROMOTIONS.filter(pk=promotion_id), "promotion")
    call.finish()
    with refusals():
        promotion.undo(found, call.user)
    return JsonResponse(promotion_json(found), status=202)
