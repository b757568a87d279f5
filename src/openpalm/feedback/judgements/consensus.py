"""One preference record for each item: the consensus of its judgements."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from django.db.models import QuerySet

from openpalm.data.rows.preferences import Preference
from openpalm.data.rows.read_result import StreamCounts
from openpalm.feedback.judgements.records import prompts_in_pieces, record, with_texts
from openpalm.feedback.models import Item, Project, Response
from openpalm.feedback.statistics.consensus import consensus

AUTHOR = "consensus"
NO_MAJORITY = "no majority among the judgements of an item"
OF_TEXTS = "written texts have no consensus"


def consensus_records(
    project: Project, counts: StreamCounts, responses: "QuerySet[Response] | None" = None
) -> Iterator[Preference]:
    """A record for each item and kind of authors, by prompt, in bounded memory.

    Of judgements that count: in force, no repetitions, not of gold items. `counts` receives the
    items without a consensus.
    """
    found = Response.objects.filter(project=project) if responses is None else responses
    found = found.filter(
        in_force=True, state=Response.State.SUBMITTED, assignment__repeat=0
    ).exclude(item__purpose=Item.Purpose.GOLD)
    for ids in prompts_in_pieces(project):
        rows = with_texts(found.filter(item__prompt__in=ids))
        rows = rows.order_by("item__prompt", "author_kind", "item", "pk")
        for _, group in groupby(rows, lambda row: (row.item_id, row.author_kind)):
            if (made := _one(list(group), counts)) is not None:
                yield made


def _one(judgements: Sequence[Response], counts: StreamCounts) -> Preference | None:
    newest = judgements[-1]
    name = f"item {newest.item_id} by {newest.author_kind}"
    kinds = {judgement.kind for judgement in judgements}
    if kinds & {"edit", "write"}:
        counts.leave_out(name, OF_TEXTS)
        return None
    payload = consensus(newest.kind, [judgement.payload for judgement in judgements])
    if payload is None:
        counts.leave_out(name, NO_MAJORITY)
        return None
    versions = {judgement.guideline_version for judgement in judgements}
    whole = record(newest)
    return replace(
        whole,
        id=f"{name}: consensus of {len(judgements)}",
        payload=payload,
        author=AUTHOR,
        elapsed_s=None,
        guideline_version=whole.guideline_version if len(versions) == 1 else None,
    )
