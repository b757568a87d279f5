"""Who may see an item's judgements, model names and expected answer: nobody who may still judge it.

This holds for every role. They are shown once the member has judged, skipped or flagged the item,
or the item is closed. Items of a comparison of models stay hidden until it is decided: until then a
judgement can be changed or undone.
"""

from collections.abc import Iterable

from openpalm.feedback.models import Assignment, Comparison, Item, User

_UNDECIDED = (Comparison.State.GENERATING, Comparison.State.JUDGING)
_LEFT = (Assignment.State.SUBMITTED, Assignment.State.SKIPPED, Assignment.State.FLAGGED)


def revealed(items: Iterable[Item], user: User) -> set[int]:
    """The ids of the items that the user may see in full."""
    items = list(items)
    done = {item.pk for item in items if item.state != Item.State.OPEN}
    still = [item.pk for item in items if item.pk not in done]
    left = Assignment.objects.filter(item__in=still, user=user, state__in=_LEFT)
    # The user has the item open again as a repeat: the first judgement stays hidden.
    held = Assignment.objects.filter(item__in=items, user=user, state=Assignment.State.OPEN)
    seen = done | set(left.values_list("item_id", flat=True))
    return seen - set(held.values_list("item_id", flat=True)) - _hidden(items, user)


def _hidden(items: list[Item], user: User) -> set[int]:
    """Items of undecided comparisons, except those that the user revealed.

    `item_changes.reveal` stores a skipped assignment without a response, which cannot be undone.
    """
    compared = {item.comparison_id for item in items} - {None}
    if not compared:
        return set()
    undecided = Comparison.objects.filter(pk__in=compared, state__in=_UNDECIDED)
    found = set(undecided.values_list("id", flat=True))
    hidden = [item.pk for item in items if item.comparison_id in found]
    given_up = Assignment.objects.filter(
        item__in=hidden, user=user, state=Assignment.State.SKIPPED, responses=None
    )
    return set(hidden) - set(given_up.values_list("item_id", flat=True))
