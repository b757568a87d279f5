"""Changes of items by managers, each in one transaction."""

from typing import Any

from django.db import transaction
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.judgements.queue import give_back, lock_item
from openpalm.feedback.models import Assignment, Item, User


@transaction.atomic
def withdraw(item_id: int) -> None:
    """Takes the item out of the queue. A judgement in progress is stored but not counted."""
    item = lock_item(item_id)
    for lease in item.assignments.filter(state=Assignment.State.OPEN).select_for_update():
        lease.state = Assignment.State.RETURNED
        lease.save(update_fields=["state"])
        give_back(lease)
    Item.objects.filter(pk=item_id).update(state=Item.State.WITHDRAWN)


@transaction.atomic
def reopen(item_id: int) -> None:
    """Raises DataError if the item is not withdrawn."""
    item = lock_item(item_id)
    if item.state != Item.State.WITHDRAWN:
        raise DataError("only a withdrawn item can be reopened")
    is_whole = item.purpose != Item.Purpose.GOLD and item.submitted >= item.needed
    item.state = Item.State.COMPLETE if is_whole else Item.State.OPEN
    item.save(update_fields=["state"])


@transaction.atomic
def make_gold(item_id: int, kind: str, payload: dict[str, Any]) -> None:
    """Shows the item to every labeler, with `payload` as the expected answer.

    Earlier judgements stay but hold no places: a gold item has none.
    """
    item = lock_item(item_id)
    if item.purpose == Item.Purpose.COMPARISON:
        raise DataError("an item of a comparison of models cannot become a gold item")
    item.assignments.update(counted=False)
    item.purpose, item.gold, item.gold_kind = Item.Purpose.GOLD, payload, kind
    item.taken = item.submitted = 0
    item.state = Item.State.OPEN
    item.save(update_fields=["purpose", "gold", "gold_kind", "taken", "submitted", "state"])


def set_priority(item_id: int, priority: float) -> None:
    Item.objects.filter(pk=item_id).update(priority=priority)


@transaction.atomic
def reveal(item: Item, user: User) -> None:
    """Takes the item out of the user's own queue, so that they may see all of it."""
    lock_item(item.pk)
    if item.assignments.filter(user=user).exists():
        raise DataError("you have this item open; judge or skip it first")
    now = timezone.now()
    Assignment.objects.create(
        item=item,
        user=user,
        project_id=item.project_id,
        state=Assignment.State.SKIPPED,
        order=list(range(item.places.count())),
        counted=False,
        leased_at=now,
        expires_at=now,
    )
