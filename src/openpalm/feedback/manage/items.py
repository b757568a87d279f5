"""Pages of items: the list with filters, one item with its judgements, changes."""

import math
from typing import Any

from django.contrib import messages
from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.items import item_changes
from openpalm.feedback.items.blinding import revealed
from openpalm.feedback.items.model_names import is_blind
from openpalm.feedback.judgements.words import LETTERS, describe, describe_payload, pieces
from openpalm.feedback.labeling.context import LONG
from openpalm.feedback.manage.pages import find, open_flags, page
from openpalm.feedback.models import Candidate, Item, ItemCandidate, Response, Role, Task, User
from openpalm.feedback.paging import id_of, name_in, page_of, within

ARMS = ("random", "active")
MAX_PRIORITY = 1e6
FILTERS = ("state", "purpose", "arm", "who", "only")


@require_GET
@project_page(Role.REVIEWER)
def items(request: ProjectRequest) -> HttpResponse:
    rows = _filtered(request).select_related("prompt")
    return page(
        request,
        "items",
        page=page_of(rows, request),
        states=Item.State.values,
        purposes=Item.Purpose.values,
        arms=ARMS,
        chosen={name: request.GET.get(name, "") for name in FILTERS},
    )


def _filtered(request: ProjectRequest) -> "QuerySet[Item]":
    rows, given = Item.objects.filter(project=request.project), request.GET
    allowed = {"state": Item.State.values, "purpose": Item.Purpose.values, "arm": ARMS}
    for name, values in allowed.items():
        if given.get(name) in values:
            rows = rows.filter(**{name: given[name]})
    if given.get("only") == "flagged":
        rows = rows.filter(pk__in=open_flags(request.project).order_by().values("item_id"))
    elif given.get("only") == "names":
        named = Candidate.objects.filter(names_itself=True)
        rows = rows.filter(pk__in=ItemCandidate.objects.filter(candidate__in=named).values("item"))
    if who := name_in(request):
        # The user and the page's place are known first: else PostgreSQL may read the judgements of
        # all users, those of all items that the page does not reach.
        if not (user := User.objects.filter(username=who).first()):
            return rows.none()
        judged = Response.objects.filter(project=request.project, user=user).exclude(in_force=False)
        rows = rows.filter(pk__in=within(judged, request, "item_id").values("item_id"))
    return rows


@require_GET
@project_page(Role.REVIEWER)
def item(request: ProjectRequest, item_id: int) -> HttpResponse:
    """One item. Models, judgements and the expected answer: see blinding.py."""
    found = find(Item.objects.select_related("prompt"), item_id, request)
    is_revealed = found.pk in revealed([found], request.user)
    places = list(found.places.select_related("candidate__model"))
    shows_names = is_revealed or not is_blind(request.project, found)
    answers = [
        {
            "letter": LETTERS[place.position],
            "candidate": place.candidate,
            "pieces": pieces(place.candidate.text),
            "is_long": len(place.candidate.text) > LONG,
            "model": _model_name(place.candidate) if shows_names else "",
        }
        for place in places
    ]
    turns = [(m["role"], pieces(m["content"])) for m in found.prompt.messages]
    return page(
        request,
        "item",
        item=found,
        turns=turns,
        answers=answers,
        shows_names=shows_names,
        is_revealed=is_revealed,
        judgements=_judgements(found) if is_revealed else [],
        expected=_expected(found) if is_revealed else "",
        has_expected=found.purpose == Item.Purpose.GOLD,
        choices=_gold_choices(request.project.task),
    )


def _expected(found: Item) -> str:
    return describe_payload(found.gold_kind, found.gold) if found.gold else ""


def _model_name(candidate: Candidate) -> str:
    return candidate.model.name if candidate.model else candidate.checkpoint or "unknown"


def _judgements(found: Item) -> list[tuple[Response, str]]:
    """The judgements, skips and flags of an item, the newest first."""
    rows = found.responses.select_related("user").order_by("-id")[:200]
    return [(row, describe(row)) for row in rows]


def _gold_choices(task: str) -> list[tuple[str, str]]:
    """The expected answers that a form can offer; of other tasks a judgement is chosen."""
    match task:
        case Task.PAIR:
            return [
                ("0", "A is better"),
                ("1", "B is better"),
                ("tie", "tie"),
                ("both_bad", "both bad"),
            ]
        case Task.THUMBS:
            return [("up", "good"), ("down", "bad")]
    return []


def _gold_payload(task: str, choice: str) -> tuple[str, dict[str, Any]]:
    match task, choice:
        case Task.PAIR, ("0" | "1"):
            better = int(choice)
            return "compare", {"better": better, "worse": 1 - better, "strength": 1}
        case Task.PAIR, ("tie" | "both_bad"):
            return "compare", {choice: [0, 1]}
        case Task.THUMBS, ("up" | "down"):
            return "thumb", {"up": choice == "up", "candidate": 0}
    raise DataError("choose the expected answer")


@require_POST
@project_page(Role.ADMIN)
def item_gold(request: ProjectRequest, item_id: int) -> HttpResponse:
    """Makes an item gold: `choice` is the expected answer, or `response` a judgement that is."""
    found = find(Item.objects.select_related("prompt"), item_id, request)
    try:
        if given := request.POST.get("response", ""):
            kind, payload = _judged(found, given)
        else:
            kind, payload = _gold_payload(request.project.task, request.POST.get("choice", ""))
        if kind == "compare" and found.places.count() != 2:
            raise DataError("a comparison needs two answers")
        item_changes.make_gold(found.pk, kind, payload)
    except DataError as error:
        messages.error(request, f"Not changed: {error}.")
    else:
        _audit(request, "item.made_gold", found, expected=describe_payload(kind, payload))
        messages.success(request, "The item is gold: everybody is given it.")
    return redirect("item", request.project.slug, found.pk)


def _judged(found: Item, response_id: str) -> tuple[str, dict[str, Any]]:
    response = found.responses.filter(pk=id_of(response_id), in_force=True).first()
    if response is None or response.state != Response.State.SUBMITTED:
        raise DataError("this judgement is not in force")
    return response.kind, response.payload


@require_POST
@project_page(Role.ADMIN)
def item_change(request: ProjectRequest, item_id: int) -> HttpResponse:
    """`action` is withdraw, reopen or reveal; `priority` sets the priority."""
    found = find(Item.objects.select_related("prompt"), item_id, request)
    action, details = request.POST.get("action", ""), {}
    try:
        match action:
            case "withdraw":
                item_changes.withdraw(found.pk)
            case "reopen":
                item_changes.reopen(found.pk)
            case "reveal":
                item_changes.reveal(found, request.user)
            case "priority":
                details["priority"] = _priority(request.POST.get("priority", ""))
                item_changes.set_priority(found.pk, details["priority"])
            case _:
                raise DataError("there is no such action")
    except DataError as error:
        messages.error(request, f"Not changed: {error}.")
    else:
        _audit(request, f"item.{action}", found, **details)
    return redirect("item", request.project.slug, found.pk)


def _priority(text: str) -> float:
    try:
        priority = float(text)
    except ValueError:
        priority = math.nan
    if not abs(priority) <= MAX_PRIORITY:
        raise DataError(f"a priority is a number from -{MAX_PRIORITY:g} to {MAX_PRIORITY:g}")
    return priority


def _audit(request: ProjectRequest, action: str, found: Item, **data: Any) -> None:
    audit.record_for(request, action, target=f"item {found.pk}", **data)
