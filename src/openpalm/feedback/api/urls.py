"""URLs under /api/v1/."""

from typing import Any

from django.http import HttpRequest, JsonResponse
from django.urls import path, re_path
from django.views.decorators.csrf import csrf_exempt

from openpalm.feedback.accounts.access import public_page
from openpalm.feedback.api import conversations, items, judging, projects, responses, training
from openpalm.feedback.api.endpoints import Operation, endpoint
from openpalm.feedback.api.errors import ApiError
from openpalm.feedback.api.openapi import index, openapi


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
    _named("projects/<slug:slug>/next", "next", POST=judging.next_item),
    _named(
        "projects/<slug:slug>/conversations",
        "conversations",
        POST=conversations.create_conversation,
    ),
    _named("assignments/<int:assignment_id>/submit", "submit", POST=judging.submit),
    _named("assignments/<int:assignment_id>/skip", "skip", POST=judging.skip),
    _named("assignments/<int:assignment_id>/flag", "flag", POST=judging.flag),
    _named("assignments/<int:assignment_id>/draft", "draft", POST=judging.draft),
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
    _named("models", "models", GET=training.list_models),
    _named("models/<int:model_id>", "model", GET=training.get_model),
    _named("models/<int:model_id>/promote", "promote", POST=training.promote),
    re_path(r"^", unknown, name="api-unknown"),
]
