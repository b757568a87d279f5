"""Stores judgements, skips, flags, drafts; undoes, deletes them. A call is one transaction."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db.models import F
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.database import writing
from openpalm.feedback.judgements.categories import category_of, picked_position
from openpalm.feedback.judgements.queue import give_back, lock_item, take_place
from openpalm.feedback.models import Assignment, Item, Project, Response, User

State = Assignment.State
MAX_ELAPSED_MS = 24 * 3600 * 1000
MAX_REASON = 2000


@dataclass(frozen=True)
class Judgement:
    """What a user decided: `payload` is as in a preference record of this `kind`."""

    kind: str
    payload: dict[str, Any]
    elapsed_ms: int | None = None
    guideline_version: int | None = None
    reason: str = ""


@writing()
def submit(assignment_id: int, user: User, judgement: Judgement) -> Response:
    """Stores the judgement. A second submission of one assignment returns the first response.

    If the lease had expired and the place is gone, the response is kept as surplus, not counted.
    """
    item, assignment = _lock(assignment_id, user)
    if assignment.state == State.SUBMITTED:
        return assignment.responses.order_by("-id")[0]
    counts = assignment.state == State.OPEN or take_place(item, assignment)
    state = Response.State.SUBMITTED if counts else Response.State.SURPLUS
    if not counts and (kept := assignment.responses.filter(state=state).first()):
        return kept
    assignment.responses.filter(in_force=True).update(in_force=False)  # a flag, judged after all
    response = _store(assignment, user, judgement, state)
    assignment.state = State.SUBMITTED if counts else State.RETURNED
    assignment.draft = None
    assignment.save(update_fields=["state", "draft"])
    if counts and assignment.counted:
        item.refresh_from_db()
        item.submitted += 1
        if item.submitted >= item.needed and item.state == Item.State.OPEN:
            item.state = Item.State.COMPLETE
        item.save(update_fields=["submitted", "state"])
    return response


@writing()
def skip(
    assignment_id: int,
    user: User,
    reason: str,
    elapsed_ms: int | None = None,
    guideline_version: int | None = None,
) -> Response:
    """Gives the item back for others to judge; this user will not see it again."""
    judgement = Judgement("skip", {}, elapsed_ms, guideline_version, reason)
    return _leave(assignment_id, user, judgement, State.SKIPPED, Response.State.SKIPPED)


@writing()
def flag(
    assignment_id: int,
    user: User,
    reason: str,
    candidate: int | None = None,
    elapsed_ms: int | None = None,
    guideline_version: int | None = None,
) -> Response:
    """As skip, and the managers see the reason."""
    if not reason.strip():
        raise DataError("a flag needs a reason: say what is wrong with the item")
    payload = {"candidate": candidate, "reason": reason}
    judgement = Judgement("flag", payload, elapsed_ms, guideline_version, reason)
    return _leave(assignment_id, user, judgement, State.FLAGGED, Response.State.FLAGGED)


@writing()
def change(assignment_id: int, user: User, judgement: Judgement) -> Response:
    """Replaces the judgement of an assignment: a new response that supersedes the old one.

    Raises DataError if there is none in force.
    """
    item, assignment = _lock(assignment_id, user)
    old = assignment.responses.filter(in_force=True, state=Response.State.SUBMITTED).first()
    if old is None:
        raise DataError("this judgement was undone or deleted; it cannot be changed")
    check_undecided(item, old)
    if (old.kind, old.payload) == (judgement.kind, judgement.payload):
        return old
    old.in_force = False
    old.save(update_fields=["in_force"])
    return _store(assignment, user, judgement, Response.State.SUBMITTED)


@writing()
def save_draft(assignment_id: int, user: User, draft: dict[str, Any]) -> None:
    """Keeps an unfinished judgement and extends the lease."""
    _, assignment = _lock(assignment_id, user)
    if assignment.state != State.OPEN:
        return
    now = timezone.now()
    assignment.draft, assignment.drafted_at = draft, now
    assignment.expires_at = now + timedelta(minutes=assignment.project.lease_minutes)
    assignment.save(update_fields=["draft", "drafted_at", "expires_at"])


@writing()
def undo(project: Project, user: User) -> Assignment | None:
    """Opens the user's last judged, skipped or flagged item again; None if there is none.

    Raises DataError if its place has gone to another person in between.
    """
    last = (
        Response.objects.filter(project=project, user=user)
        .exclude(state__in=[Response.State.DELETED, Response.State.SURPLUS])
        .order_by("-id")
        .first()
    )
    if last is None:
        return None
    item, assignment = _lock(last.assignment_id, user)
    last.refresh_from_db()  # another request may have undone or deleted it before the lock
    if last.state in (Response.State.UNDONE, Response.State.DELETED):
        return None
    check_undecided(item, last)
    if assignment.state == State.SUBMITTED:
        if assignment.counted:
            _uncount(item)
    elif not take_place(item, assignment):
        raise DataError("this item has gone to another person; it cannot be opened again")
    last.state, last.in_force = Response.State.UNDONE, False
    last.save(update_fields=["state", "in_force"])
    now = timezone.now()
    assignment.state, assignment.leased_at = State.OPEN, now
    assignment.expires_at = now + timedelta(minutes=project.lease_minutes)
    assignment.draft = {"kind": last.kind, "payload": last.payload, "reason": last.reason}
    assignment.save(update_fields=["state", "leased_at", "expires_at", "draft"])
    return assignment


def check_undecided(item: Item, response: Response) -> None:
    """Raises DataError if a comparison of models was decided with this judgement.

    Its models are shown from then on, and its decision must stay what the judgements say.
    """
    comparison = item.comparison
    if comparison is not None and response.pk <= comparison.result.get("newest", 0):
        raise DataError("the comparison was decided with this judgement; it stays as it is")


def _lock(assignment_id: int, user: User) -> tuple[Item, Assignment]:
    """Locks item and assignment. Raises Assignment.DoesNotExist if it is not this user's."""
    mine = Assignment.objects.filter(pk=assignment_id, user=user)
    item = lock_item(mine.values_list("item_id", flat=True).get())
    return item, mine.select_for_update(of=("self",), no_key=True).select_related("project").get()


def _uncount(item: Item) -> None:
    """Takes one response out of the item's count; a complete item is open again."""
    Item.objects.filter(pk=item.pk).update(submitted=F("submitted") - 1)
    Item.objects.filter(pk=item.pk, state=Item.State.COMPLETE).update(state=Item.State.OPEN)


@writing()
def delete(response_id: int) -> None:
    """Erases a judgement and opens its place to another person.

    The row stays without its payload, and the snapshots of trained models keep the judgement; see
    training/lineage.py.
    """
    found = Response.objects.get(pk=response_id)
    item = lock_item(found.item_id)
    response = Response.objects.select_for_update(no_key=True).get(pk=response_id)
    assignment = Assignment.objects.select_for_update(no_key=True).get(pk=found.assignment_id)
    if response.in_force and assignment.state == State.SUBMITTED:
        if assignment.counted:
            _uncount(item)
            give_back(assignment)
        assignment.state = State.RETURNED
    assignment.draft = None
    assignment.save(update_fields=["state", "draft"])
    response.state, response.in_force = Response.State.DELETED, False
    response.payload, response.reason = {}, ""
    response.category = response.picked_place = None
    response.save()


def _leave(
    assignment_id: int, user: User, judgement: Judgement, state: str, response_state: str
) -> Response:
    _, assignment = _lock(assignment_id, user)
    if assignment.state in (State.SUBMITTED, State.SKIPPED, State.FLAGGED):
        return assignment.responses.order_by("-id")[0]
    if assignment.state == State.OPEN:
        give_back(assignment)
    response = _store(assignment, user, judgement, response_state)
    assignment.state = state
    assignment.draft = None
    assignment.save(update_fields=["state", "draft"])
    return response


def _store(assignment: Assignment, user: User, judgement: Judgement, state: str) -> Response:
    picked = picked_position(judgement.kind, judgement.payload)
    return Response.objects.create(
        project_id=assignment.project_id,
        item_id=assignment.item_id,
        user=user,
        assignment=assignment,
        author_kind=user.kind,
        state=state,
        kind=judgement.kind,
        payload=judgement.payload,
        reason=judgement.reason,
        category=category_of(judgement.kind, judgement.payload),
        picked_place=None if picked is None else assignment.order.index(picked),
        elapsed_ms=judgement.elapsed_ms,
        guideline_version=judgement.guideline_version,
        supersedes=assignment.responses.order_by("-id").first(),
    )
