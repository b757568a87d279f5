"""/api/v1/responses: judgements. An annotator sees and deletes their own, a reviewer sees all."""

import json
from collections.abc import Iterator
from uuid import UUID

from django.http import JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import has_rank
from openpalm.feedback.api.endpoints import Call, operation
from openpalm.feedback.api.errors import ApiError
from openpalm.feedback.api.fields import MAX_ID
from openpalm.feedback.api.json_forms import response_json
from openpalm.feedback.exchange.exporting import FORMATS, export_rows
from openpalm.feedback.labeling import submission
from openpalm.feedback.models import Response, Role


@operation("responses:read", Role.ANNOTATOR)
def list_responses(call: Call) -> JsonResponse:
    project, role = call.project_in_query()
    responses = Response.objects.filter(project=project).select_related("user")
    if item := call.query.whole("item", 1, MAX_ID, None):
        responses = responses.filter(item_id=item)
    if author := call.query.text("author", most=150, default=None):
        responses = responses.filter(user__username=author)
    if not has_rank(role, Role.REVIEWER):
        responses = responses.filter(user=call.user)
    return call.page(responses, response_json)


@operation("responses:read", Role.ANNOTATOR)
def get_response(call: Call, uid: UUID) -> JsonResponse:
    found = _visible(call, uid)
    call.finish()
    return JsonResponse(response_json(found))


@operation("responses:write", Role.ANNOTATOR)
def delete_response(call: Call, uid: UUID) -> JsonResponse:
    """Erases a judgement of one's own, or as an admin any; lists the models that it is in."""
    found = _visible(call, uid, others=Role.ADMIN)
    call.finish()
    models = submission.delete(found.pk)
    audit.record(
        "response.deleted",
        user=call.user,
        project=found.project,
        target=found.uid,
        models=[model.pk for model in models],
    )
    listed = [{"id": model.pk, "name": model.name} for model in models]
    return JsonResponse({"id": str(uid), "state": Response.State.DELETED, "models": listed})


def _visible(call: Call, uid: UUID, others: str = Role.REVIEWER) -> Response:
    """The response, if it is the user's or their role is `others` or above."""
    found = Response.objects.select_related("project", "user").filter(uid=uid).first()
    if found is not None:
        _, role = call.enter(found.project.slug)
        if found.user_id == call.user.pk or has_rank(role, others):
            return found
    raise ApiError(404, "there is no such response, or you may not see it")


@operation("responses:read", Role.ADMIN)
def export(call: Call) -> HttpResponseBase:
    """All judgements in force, one JSON object a line, in one of the export formats."""
    project, _ = call.project_in_query()
    name = call.query.choice("format", FORMATS, "records")
    call.finish()
    audit.record("responses.exported", user=call.user, project=project, format=name, by="api")
    responses = Response.objects.filter(project=project)

    def lines() -> Iterator[bytes]:
        for row in export_rows(responses, name):
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"

    stream = StreamingHttpResponse(lines(), content_type="application/x-ndjson; charset=utf-8")
    stream["Content-Disposition"] = f'attachment; filename="{project.slug}-{name}.jsonl"'
    return stream
