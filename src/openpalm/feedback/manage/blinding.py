"""Who may see an item's judgements, its models' names and its expected answer: not who judges it.

A member who may still be given an item sees none of them, whatever their role. They are shown once
the member has judged, skipped or flagged it, or it is open no more.
"""

from collections.abc import Iterable

from openpalm.feedback.models import Assignment, Item, User

_LEFT = (Assignment.State.SUBMITTED, Assignment.State.SKIPPED, Assignment.State.FLAGGED)


def revealed(items: Iterable[Item], user: User) -> set[int]:
    """The ids of the items that the user may see whole."""
    items = list(items)
    done = {item.pk for item in items if item.state != Item.State.OPEN}
    still = [item.pk for item in items if item.pk not in done]
    left = Assignment.objects.filter(item__in=still, user=user, state__in=_LEFT)
    # A repetition in hand: what was said before must not be read again now.
    held = Assignment.objects.filter(item__in=items, user=user, state=Assignment.State.OPEN)
    return (done | set(left.values_list("item_id", flat=True))) - set(
        held.values_list("item_id", flat=True)
    )
