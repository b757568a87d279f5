"""The table of agreement of judgements that are given one by one."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from openpalm.feedback.statistics.agreement import AgreementCounts, Category


def table_of(
    categories: Sequence[Category], judgements: Iterable[tuple[Hashable, Hashable, Category]]
) -> AgreementCounts:
    """Of (item, rater, value), in any order."""
    items: dict[Hashable, Counter[Category]] = {}
    for item, _, value in judgements:
        items.setdefault(item, Counter())[value] += 1
    counts = (tuple(of[category] for category in categories) for of in items.values())
    return AgreementCounts.of_items(categories, counts)
