"""/api/v1/responses: judgements. An annotator sees and deletes their own, a reviewer sees all."""

from typing import Any
from uuid import UUID

from django.http import JsonResponse
from django.http.response import HttpResponseBase

from openpalm.data.rows.exports.formats import RECORDS
from openpalm.data.rows.exports.stream import EXPORT_NAMES
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import has_rank
from openpalm.feedback.api.json_forms import response_json
from openpalm.feedback.api.protocol.endpoints import Call, operation
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.manage.exporting import file_of
from openpalm.feedback.manage.responses import erase
from openpalm.feedback.models import Response, Role, User
from openpalm.feedback.paging import MAX_ID


@operation("responses:read", Role.ANNOTATOR)
def list_responses(call: Call) -> JsonResponse:
    project, role = call.project_in_query()
    item = call.query.whole("item", 1, MAX_ID, None)
    # By the item's project, not the judgement's: SQLite would read all judgements of the project.
    of = {"project": project} if item is None else {"item": item, "item__project": project}
    # Not joined: the judgements of a page share users and items.
    responses = Response.objects.filter(**of).prefetch_related("user", "item")
    if author := call.query.text("author", most=150, default=None):
        # Known first: PostgreSQL takes an unknown one for average, and reads all to find few.
        user = User.objects.filter(username=author).first()
        responses = responses.filter(user=user) if user else responses.none()
    if not has_rank(role, Role.REVIEWER):
        responses = responses.filter(user=call.user)
    return call.page(responses, lambda found: shown_responses(call, found))


@operation("responses:read", Role.ANNOTATOR)
def get_response(call: Call, uid: UUID) -> JsonResponse:
    found = _visible(call, uid)
    call.finish()
    return JsonResponse(shown_responses(call, [found])[0])


def shown_responses(call: Call, responses: list[Response]) -> list[dict[str, Any]]:
    """Nobody sees a judgement of an item that they may still be given themselves."""
    open_to = revealed({r.item_id: r.item for r in responses}.values(), call.user)
    return [response_json(r, is_revealed=r.item_id in open_to) for r in responses]


@operation("responses:write", Role.ANNOTATOR)
def delete_response(call: Call, uid: UUID) -> JsonResponse:
    """Erases one's own judgement, or as an admin any; lists the models trained on it."""
    found = _visible(call, uid, others=Role.ADMIN)
    call.finish()
    listed = [{"id": model.pk, "name": model.name} for model in erase(found, call.user)]
    return JsonResponse({"id": str(uid), "state": Response.State.DELETED, "models": listed})


def _visible(call: Call, uid: UUID, others: str = Role.REVIEWER) -> Response:
    """The response, if it is the user's or their role is `others` or above."""
    rows = Response.objects.select_related("user", "item").filter(uid=uid)
    found = call.find(rows, "response")
    if found.user_id == call.user.pk or has_rank(call.role, others):
        return found
    raise ApiError(404, "there is no such response, or you may not see it")


@operation("responses:read", Role.ADMIN)
def export(call: Call) -> HttpResponseBase:
    """All judgements in force, streamed in one of the export formats: JSON lines, or CSV.

    With `consensus=true` a row for each item.
    """
    project, _ = call.project_in_query()
    name = call.query.choice("format", EXPORT_NAMES, RECORDS)
    is_consensus = call.query.choice("consensus", ("true", "false"), "false") == "true"
    call.finish()
    about = {"by": "api"} | ({"consensus": True} if is_consensus else {})
    audit.record("export.downloaded", user=call.user, project=project, target=name, **about)
    return file_of(project, name, is_consensus=is_consensus)
