"""/api/v1/items: what is judged. See items/blinding.py for who sees the names of models."""

from typing import Any

from django.db import IntegrityError
from django.db.models import Prefetch
from django.http import JsonResponse

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.api.json_forms import item_json
from openpalm.feedback.api.protocol.endpoints import Call, operation
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.api.protocol.fields import Fields
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.items.model_names import names_itself
from openpalm.feedback.items.new_items import (
    KeyTaken,
    NewCandidate,
    NewItem,
    add_items,
    check_messages,
    known_digests,
    prompt_digest,
)
from openpalm.feedback.items.tasks import KINDS, candidates_needed
from openpalm.feedback.judgements.payloads import wrong_payload
from openpalm.feedback.models import Item, ItemCandidate, ModelVersion, Project, Role

MAX_TEXT = 100_000
MAX_ITEMS = 500


@operation("items:read", Role.REVIEWER)
def list_items(call: Call) -> JsonResponse:
    project, _ = call.project_in_query()
    items = Item.objects.filter(project=project)
    if state := call.query.choice("state", Item.State.values, None):
        items = items.filter(state=state)
    return call.page(_with_texts(items), lambda found: _shown(call, found))


@operation("items:read", Role.REVIEWER)
def get_item(call: Call, item_id: int) -> JsonResponse:
    found = call.find(_with_texts(Item.objects).filter(pk=item_id), "item")
    call.finish()
    return JsonResponse(_shown(call, [found])[0])


def _shown(call: Call, items: list[Item]) -> list[dict[str, Any]]:
    open_to = revealed(items, call.user)
    return [item_json(item, is_revealed=item.pk in open_to) for item in items]


def _with_texts(items: Any) -> Any:
    places = ItemCandidate.objects.select_related("candidate__model")
    return items.select_related("prompt", "project").prefetch_related(Prefetch("places", places))


@operation("items:write", Role.ADMIN)
def create_items(call: Call) -> JsonResponse:
    """All of them or none. An item with a `key` that the project has is not made again."""
    project, _ = call.enter(call.body.text("project", most=60))
    given = call.body.objects("items", least=1, most=MAX_ITEMS)
    call.finish()
    models = {m.name: m for m in ModelVersion.objects.filter(project=project)}
    new = [_new_item(one, project, models) for one in given]
    _refuse_held_out(project, new)
    try:
        made = add_items(project, new)
    except (KeyTaken, IntegrityError) as error:
        message = f"{error}" if isinstance(error, KeyTaken) else "another request used a key first"
        raise ApiError(409, message, "items") from None
    count = sum(is_new for _, is_new in made)
    if count:
        audit.record("item.added", user=call.user, project=project, items=count, by="api")
    data = [{"id": item.pk, "key": item.key, "created": is_new} for item, is_new in made]
    return JsonResponse({"data": data}, status=201 if count else 200)


def _refuse_held_out(project: Project, new: list[NewItem]) -> None:
    """A prompt that is judged for training is of no use for a comparison."""
    digests = [prompt_digest(item.messages) for item in new]
    held_out = known_digests(project, digests, held_out=True)
    for number, digest in enumerate(digests):
        if digest in held_out:
            message = f"items[{number}]: its prompt is held out for comparisons"
            raise ApiError(409, message, f"items[{number}]")


def _new_item(given: Fields, project: Project, models: dict[str, ModelVersion]) -> NewItem:
    messages = read_messages(given)
    least, most = candidates_needed(project.task)
    candidates = tuple(
        _candidate(one, models) for one in given.objects("candidates", least=least, most=most)
    )
    gold = given.group("gold", MAX_TEXT, None)
    kind = KINDS[project.task]
    if gold is not None and (wrong := wrong_payload(project, kind, gold, len(candidates))):
        given.fail("gold", wrong)
    item = NewItem(
        messages=messages,
        candidates=candidates,
        source="api",
        key=given.text("key", most=100, default=None),
        purpose=Item.Purpose.TRAINING if gold is None else Item.Purpose.GOLD,
        priority=given.number("priority", -1e6, 1e6, 0.0),
        needed=given.whole("needed", 1, 20, None),
        gold=gold,
        gold_kind=kind if gold is not None else "",
    )
    given.finish()
    return item


def read_messages(given: Fields) -> list[dict[str, str]]:
    """The field `messages`, or `prompt`, a text that becomes a turn of the user."""
    if given.has("prompt"):
        messages = [{"role": "user", "content": given.text("prompt", most=MAX_TEXT)}]
    else:
        messages = []
        for turn in given.objects("messages", least=1, most=200):
            role = turn.choice("role", ("system", "user", "assistant"))
            messages.append({"role": role, "content": turn.text("content", most=MAX_TEXT)})
            turn.finish()
    try:
        check_messages(messages)
    except DataError as error:
        given.fail("prompt" if given.has("prompt") else "messages", f"{error}")
    return messages


def _candidate(given: Fields, models: dict[str, ModelVersion]) -> NewCandidate:
    """Marks a text that names its model, which cannot be judged blind."""
    name = given.text("model", most=120, default=None)
    if name is not None and name not in models:
        given.fail("model", "the project has no model of this name")
    text = given.text("text", most=MAX_TEXT)
    candidate = NewCandidate(
        text=text,
        names_itself=names_itself(text, models),
        checkpoint=given.text("checkpoint", most=200, default=""),
        sampling=given.group("sampling", 4000, None),
        model=models[name] if name is not None else None,
    )
    given.finish()
    return candidate
