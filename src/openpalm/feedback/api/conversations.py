"""/api/v1/projects/<slug>/conversations: takes conversations of the chat page, with consent.

`openpalm serve --conversation-url` posts here. A conversation becomes a prompt of the project with
the answer as a candidate; posting it again changes nothing.
"""

from django.db import transaction
from django.http import JsonResponse

from openpalm.feedback.api.items import MAX_TEXT, read_messages
from openpalm.feedback.api.protocol.endpoints import Call, operation
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.items.model_names import names_itself, names_of
from openpalm.feedback.items.new_items import add_prompts
from openpalm.feedback.models import Candidate, ModelVersion, Project, Prompt, Role


@operation("conversations:write", Role.ADMIN)
def create_conversation(call: Call, slug: str) -> JsonResponse:
    """Needs `store`: true, the consent of the conversation's user."""
    project, _ = call.enter(slug)
    body = call.body
    if not body.flag("store"):
        raise ApiError(400, "store is false: its user did not consent, so it is not kept", "store")
    messages = read_messages(body)
    candidate = Candidate(
        text=body.text("answer", most=MAX_TEXT),
        sampling=body.group("sampling", 4000, None),
    )
    path = body.text("checkpoint", most=1000, default="")
    model = body.text("model", most=200, default="")
    body.number("created", 0, 1e12, None)
    call.finish()
    known = _model(project, path, model)
    candidate.model_id = known.pk if known else None
    # The hash of the checkpoint says more than the place where it was.
    is_exact = known is not None and known.path == path
    candidate.checkpoint = known.checkpoint if known and is_exact else path[:200]
    candidate.names_itself = names_itself(candidate.text, names_of(project))
    prompt, is_new = _add(project, messages, candidate)
    return JsonResponse({"prompt": prompt.pk, "created": is_new}, status=201 if is_new else 200)


def _model(project: Project, path: str, name: str) -> ModelVersion | None:
    """By its path: a promoted model keeps the name in the API of the one before."""
    models = ModelVersion.objects.filter(project=project)
    found = models.filter(path=path).first() if path else None
    return found or models.filter(name=name).first()


@transaction.atomic
def _add(
    project: Project, messages: list[dict[str, str]], candidate: Candidate
) -> tuple[Prompt, bool]:
    (prompt,) = add_prompts(project, [(messages, "chat")], shared_with_consent=True)
    Prompt.objects.select_for_update(no_key=True).get(pk=prompt.pk)
    same = Candidate.objects.filter(
        prompt=prompt, text=candidate.text, checkpoint=candidate.checkpoint
    )
    if same.exists():
        return prompt, False
    candidate.prompt = prompt
    candidate.save()
    return prompt, True
