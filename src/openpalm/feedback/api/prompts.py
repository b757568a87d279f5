"""/api/v1/prompts: prompts to answer, and those held out for comparisons of models."""

from django.db import transaction
from django.http import JsonResponse

from openpalm.feedback.accounts import audit
from openpalm.feedback.api.items import read_messages
from openpalm.feedback.api.json_forms import prompt_json
from openpalm.feedback.api.protocol.endpoints import Call, each, operation
from openpalm.feedback.api.protocol.errors import refusals
from openpalm.feedback.items import prompts
from openpalm.feedback.items.new_items import Messages, prompt_digest
from openpalm.feedback.models import Project, Prompt, Role, Task

MAX_PROMPTS = 500
SOURCES = ("file", "chat", "typed", "api")


@operation("prompts:read", Role.ADMIN)
def list_prompts(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    found = Prompt.objects.filter(project=project)
    if source := call.query.choice("source", SOURCES, None):
        found = found.filter(source=source)
    if held_out := call.query.choice("held_out", ("true", "false"), None):
        found = found.filter(held_out=held_out == "true")
    return call.page(found, each(prompt_json))


@operation("prompts:read", Role.ADMIN)
def get_prompt(call: Call, prompt_id: int) -> JsonResponse:
    found = call.find(Prompt.objects.filter(pk=prompt_id), "prompt")
    call.finish()
    return JsonResponse(prompt_json(found))


@operation("prompts:write", Role.ADMIN)
def create_prompts(call: Call) -> JsonResponse:
    """All of them or none. A prompt that the project has is left as it is.

    `held_out` of a prompt says whether it is; without it, `held_out_share` of them are, and the
    text decides which.
    """
    project, _ = call.enter(call.body.text("project", most=60))
    share = call.body.number("held_out_share", 0, 1, 0.0)
    given: list[tuple[Messages, float]] = []
    for one in call.body.objects("prompts", least=1, most=MAX_PROMPTS):
        held_out = one.flag("held_out", None)
        given.append((read_messages(one), share if held_out is None else float(held_out)))
        one.finish()
    call.finish()
    if project.task == Task.DEMONSTRATION and any(share for _, share in given):
        call.body.fail("prompts", "people write the answers here, so none is held out")
    made, count = _add(call, project, given)
    return JsonResponse({"data": made}, status=201 if count else 200)


@transaction.atomic
def _add(
    call: Call, project: Project, given: list[tuple[Messages, float]]
) -> tuple[list[dict[str, object]], int]:
    fresh: set[str] = set()
    for share in {share for _, share in given}:
        alike = [messages for messages, of in given if of == share]
        fresh |= prompts.add_new(project, alike, "api", share)
    if fresh:
        audit.record("prompt.added", user=call.user, project=project, count=len(fresh), by="api")
    digests = [prompt_digest(messages) for messages, _ in given]
    found = {p.digest: p for p in Prompt.objects.filter(project=project, digest__in=digests)}
    rows = [(found[digest], digest in fresh) for digest in digests]
    return [
        {"id": prompt.pk, "held_out": prompt.held_out, "created": is_new} for prompt, is_new in rows
    ], len(fresh)


@operation("prompts:write", Role.ADMIN)
def hold_out_prompt(call: Call, prompt_id: int) -> JsonResponse:
    """Holds a prompt out of training, or gives it back; not once it is in an item."""
    found = call.find(Prompt.objects.filter(pk=prompt_id), "prompt")
    held_out = call.body.flag("held_out")
    call.finish()
    with refusals():
        prompts.set_held_out(found, held_out, call.user)
    return JsonResponse(prompt_json(found))
