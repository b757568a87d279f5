"""Leases items to labelers such that each item gets exactly `needed` responses.

Every change of an item's places happens in one transaction that holds the item's row (PostgreSQL)
or the database (SQLite). `Item.taken` counts submitted responses and leases in force; a lease that
expires gives its place back. Locks are taken in the order user, item, assignment, and a transaction
waits for one item only. They are "no key" locks: a new row that refers to the item need not wait.
"""

import random
from datetime import timedelta

from django.db import IntegrityError, OperationalError, connection
from django.db.models import Exists, F, OuterRef, QuerySet
from django.utils import timezone

from openpalm.feedback.database import writing
from openpalm.feedback.models import Assignment, Comparison, Item, Project, User

_draw = random.SystemRandom()
ATTEMPTS = 20
REPEAT_AFTER = 10
"""judgements between an item and its repetition"""
FIRST = 20
"""items in the order of the queue that are tried at once: more than labelers at a time"""
AT_ONCE = 50
"""expired leases that one request gives back"""


def next_assignment(project: Project, user: User) -> Assignment | None:
    """The user's open assignment, or a lease of another item; None if nothing is left."""
    return_expired(project)
    for attempt in range(ATTEMPTS):
        try:
            with writing():
                return _next(project, user)
        except IntegrityError:  # another process took the last place in between
            if attempt + 1 == ATTEMPTS:
                raise
        except OperationalError as error:
            if attempt + 1 == ATTEMPTS or not _is_deadlock(error):
                raise
    return None


def _is_deadlock(error: OperationalError) -> bool:
    """Whether PostgreSQL aborted this transaction for another one, so that it can be retried."""
    return getattr(error.__cause__, "sqlstate", None) in ("40P01", "40001")


def _next(project: Project, user: User) -> Assignment | None:
    # Two tabs get the same lease.
    User.objects.select_for_update(no_key=True).get(pk=user.pk)
    mine = Assignment.objects.filter(project=project, user=user, state=Assignment.State.OPEN)
    if found := mine.select_related("item__prompt").order_by("id").first():
        return found
    if not project.open:
        return None
    if _draw.random() < project.gold_share and (item := _gold(project, user).first()):
        return _lease(item, user, project, counted=False)
    if _draw.random() < project.repeat_share and (earlier := _repeatable(project, user)):
        return _lease(earlier.item, user, project, counted=False, repeat=1)
    if user.kind == User.Kind.MODEL:
        item = _item_for_judge(project, user)
        return _lease(item, user, project, counted=False) if item else None
    if item := _free_item(project, user):
        return _lease(item, user, project, counted=True)
    return None


def _item_for_judge(project: Project, user: User) -> Item | None:
    """The next item for an AI judge, which takes the place of no person: complete items too.

    Not those of comparisons, which no model decides. In the order of their ids, so that the search
    does not pass everything that the judge has had.
    """
    mine = Assignment.objects.filter(project=project, user=user)
    last = mine.order_by("-id").values_list("item_id", flat=True).first() or 0
    items = Item.objects.filter(project=project, purpose=Item.Purpose.TRAINING)
    items = items.exclude(state=Item.State.WITHDRAWN)
    items = items.filter(~Exists(mine.filter(item=OuterRef("pk")))).order_by("id")
    return items.filter(pk__gt=last).first() or items.first()


def _free_item(project: Project, user: User) -> Item | None:
    """The next item with a free place, locked.

    Skips items that others are leasing, so that nobody waits. If no other item is left, waits for
    those: they may have another free place.
    """
    items = open_items(project, user)
    if not connection.features.has_select_for_update_skip_locked:
        return items.first()  # SQLite: the transaction holds the whole database
    # The search without locks may scan many items that the user has had, so it is made once.
    while ids := list(items.values_list("pk", flat=True)[:FIRST]):
        near = items.filter(pk__in=ids)
        found = near.select_for_update(skip_locked=True, no_key=True).first()
        if found := found or near.select_for_update(no_key=True).first():
            return found
    return None


def open_items(project: Project, user: User) -> QuerySet[Item]:
    """Items with a free place that the user has not had, the least annotated first.

    Without the pairs of comparisons that another kind of labelers decides: a judgement that does
    not count must not take the place of one that does.
    """
    had = Assignment.objects.filter(item=OuterRef("pk"), user=user)
    of_others = Comparison.objects.filter(project=project).exclude(result__author_kind=user.kind)
    return (
        Item.objects.filter(project=project, state=Item.State.OPEN, taken__lt=F("needed"))
        .exclude(purpose=Item.Purpose.GOLD)
        .exclude(comparison__in=of_others.values("id"))
        .filter(~Exists(had))
        .order_by("-priority", "taken", "id")
    )


def _gold(project: Project, user: User) -> QuerySet[Item]:
    had = Assignment.objects.filter(item=OuterRef("pk"), user=user)
    gold = Item.objects.filter(project=project, purpose=Item.Purpose.GOLD, state=Item.State.OPEN)
    return gold.filter(~Exists(had)).order_by("id")


def _repeatable(project: Project, user: User) -> Assignment | None:
    """An early assignment of this user that has not been repeated."""
    mine = Assignment.objects.filter(project=project, user=user)
    again = mine.filter(item=OuterRef("item"), repeat=1)
    first = mine.filter(repeat=0, state=Assignment.State.SUBMITTED)
    first = first.exclude(item__purpose=Item.Purpose.GOLD)
    recent = list(first.order_by("-id").values_list("id", flat=True)[:REPEAT_AFTER])
    if len(recent) < REPEAT_AFTER:
        return None
    return first.filter(~Exists(again)).exclude(id__in=recent).order_by("id").first()


def _lease(
    item: Item, user: User, project: Project, *, counted: bool, repeat: int = 0
) -> Assignment:
    order = list(range(item.places.count()))
    _draw.shuffle(order)
    now = timezone.now()
    if counted:
        # The constraint taken <= needed refuses one lease too many.
        Item.objects.filter(pk=item.pk).update(taken=F("taken") + 1)
    return Assignment.objects.create(
        item=item,
        user=user,
        project=project,
        repeat=repeat,
        order=order,
        counted=counted,
        leased_at=now,
        expires_at=now + timedelta(minutes=project.lease_minutes),
    )


def return_expired(project: Project) -> int:
    """Gives the places of expired leases back; returns how many. Must not run in a transaction."""
    now = timezone.now()
    expired = Assignment.objects.filter(
        project=project, state=Assignment.State.OPEN, expires_at__lt=now
    )
    ids = sorted(set(expired.order_by("expires_at").values_list("item_id", flat=True)[:AT_ONCE]))
    return sum(_return_expired(expired.filter(item_id=item_id), item_id) for item_id in ids)


@writing()
def _return_expired(expired: QuerySet[Assignment], item_id: int) -> int:
    lock_item(item_id)
    found = list(expired.select_for_update(no_key=True))
    for assignment in found:
        assignment.state = Assignment.State.RETURNED
        assignment.save(update_fields=["state"])
        give_back(assignment)
    return len(found)


def lock_item(item_id: int) -> Item:
    """The item's row, locked until the transaction ends."""
    return Item.objects.select_for_update(no_key=True).get(pk=item_id)


def give_back(assignment: Assignment) -> None:
    """Frees the place of an assignment. The caller holds the item's lock."""
    if assignment.counted:
        Item.objects.filter(pk=assignment.item_id).update(taken=F("taken") - 1)


def take_place(item: Item, assignment: Assignment) -> bool:
    """Takes a place for an assignment that has lost its own; False if none is free."""
    if not assignment.counted:
        return True
    if item.state != Item.State.OPEN or item.taken >= item.needed:
        return False
    Item.objects.filter(pk=item.pk).update(taken=F("taken") + 1)
    return True
