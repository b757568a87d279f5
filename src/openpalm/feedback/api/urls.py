"""URLs under /api/v1/."""

from typing import Any

from django.http import HttpRequest, JsonResponse
from django.urls import path, re_path
from django.views.decorators.csrf import csrf_exempt

from openpalm.feedback.accounts.access import public_page
from openpalm.feedback.api import (
    comparisons,
    conversations,
    items,
    judging,
    projects,
    prompts,
    responses,
    training,
    work,
)
from openpalm.feedback.api.openapi import index, openapi
from openpalm.feedback.api.protocol.endpoints import Operation, endpoint
from openpalm.feedback.api.protocol.errors import ApiError


@csrf_exempt
@public_page
def unknown(request: HttpRequest) -> JsonResponse:
    return ApiError(404, "the API has no such URL; see /api/v1/openapi.json").response()


def _named(route: str, name: str, **operations: Operation) -> Any:
    return path(route, endpoint(**operations), name=f"api-{name}")


urlpatterns = [
    path("", index, name="api"),
    path("openapi.json", openapi, name="api-openapi"),
    _named("projects", "projects", GET=projects.list_projects, POST=projects.create_project),
    _named("projects/<slug:slug>", "project", GET=projects.get_project),
    _named("projects/<slug:slug>/guidelines", "guidelines", GET=projects.get_guidelines),
    _named("projects/<slug:slug>/next", "next", POST=judging.next_item),
    _named("projects/<slug:slug>/undo", "undo", POST=judging.undo_last),
    _named("projects/<slug:slug>/generate", "generate", POST=work.generate_answers),
    _named("projects/<slug:slug>/next-batch", "next-batch", POST=work.choose_next_batch),
    _named("projects/<slug:slug>/statistics", "statistics", GET=work.get_statistics),
    _named(
        "projects/<slug:slug>/conversations",
        "conversations",
        POST=conversations.create_conversation,
    ),
    _named("assignments/<int:assignment_id>/submit", "submit", POST=judging.submit),
    _named("assignments/<int:assignment_id>/change", "change", POST=judging.change),
    _named("assignments/<int:assignment_id>/skip", "skip", POST=judging.skip),
    _named("assignments/<int:assignment_id>/flag", "flag", POST=judging.flag),
    _named("assignments/<int:assignment_id>/draft", "draft", POST=judging.draft),
    _named("prompts", "prompts", GET=prompts.list_prompts, POST=prompts.create_prompts),
    _named("prompts/<int:prompt_id>", "prompt", GET=prompts.get_prompt),
    _named("prompts/<int:prompt_id>/held-out", "held-out", POST=prompts.hold_out_prompt),
    _named("items", "items", GET=items.list_items, POST=items.create_items),
    _named("items/<int:item_id>", "item", GET=items.get_item),
    _named("responses", "responses", GET=responses.list_responses),
    _named("responses/export", "export", GET=responses.export),
    _named(
        "responses/<uuid:uid>",
        "response",
        GET=responses.get_response,
        DELETE=responses.delete_response,
    ),
    _named("runs", "runs", GET=training.list_runs, POST=training.start_run),
    _named("runs/<int:run_id>", "run", GET=training.get_run),
    _named("runs/<int:run_id>/stop", "run-stop", POST=training.stop_run),
    _named("runs/<int:run_id>/resume", "run-resume", POST=training.resume_run),
    _named("models", "models", GET=training.list_models, POST=training.register_model),
    _named("models/<int:model_id>", "model", GET=training.get_model),
    _named(
        "snapshots/<int:snapshot_id>/judgements",
        "snapshot",
        GET=training.list_snapshot_judgements,
    ),
    _named("models/<int:model_id>/choose", "choose", POST=training.choose_model),
    _named("models/<int:model_id>/score", "score", POST=training.score_model),
    _named("models/<int:model_id>/promote", "promote", POST=comparisons.promote_model),
    _named(
        "comparisons",
        "comparisons",
        GET=comparisons.list_comparisons,
        POST=comparisons.start_comparison,
    ),
    _named("comparisons/<int:comparison_id>", "comparison", GET=comparisons.get_comparison),
    _named(
        "comparisons/<int:comparison_id>/extend",
        "extend",
        POST=comparisons.extend_comparison,
    ),
    _named("promotions", "promotions", GET=comparisons.list_promotions),
    _named("promotions/<int:promotion_id>", "promotion", GET=comparisons.get_promotion),
    _named(
        "promotions/<int:promotion_id>/undo",
        "promotion-undo",
        POST=comparisons.undo_promotion,
    ),
    _named("jobs", "jobs", GET=work.list_jobs),
    _named("jobs/<int:job_id>", "job", GET=work.get_job),
    _named("jobs/<int:job_id>/stop", "job-stop", POST=work.stop_job),
    re_path(r"^", unknown, name="api-unknown"),
]
