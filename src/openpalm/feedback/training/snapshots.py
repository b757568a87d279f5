"""Freezes judgements: a .jsonl of preference records, named by the hash of its content.

What was trained on is then fixed, whatever happens to the judgements, and known down to each one.
"""

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import QuerySet

from openpalm.base.files import atomic_file
from openpalm.errors import DataError
from openpalm.feedback.judgements import records
from openpalm.feedback.models import (
    Item,
    Project,
    Response,
    Snapshot,
    SnapshotJudgement,
    User,
)
from openpalm.feedback.statistics.selection import in_reserve

BATCH = 2000
KINDS_OF_VERB = {
    "reward": ("compare", "rank", "rate", "thumb", "edit"),
    "dpo": ("compare", "rank", "edit", "thumb"),
    "sft": ("edit", "write"),
}


@dataclass(frozen=True)
class Filter:
    """Which judgements are frozen. Those of gold items and held-out prompts never are."""

    author_kinds: Sequence[str] = (User.Kind.PERSON,)
    kinds: Sequence[str] = ()
    """kinds of judgement; empty: all"""
    comparisons: bool = False
    """also those of comparisons of models, on prompts that are no longer held out"""
    up_to: int | None = None
    """id of the newest judgement"""
    users: Sequence[int] = field(default_factory=tuple)
    """ids of the authors; empty: all"""
    hold_back: bool = False
    """leaves out the prompts that the random arm is drawn from: they measure the reward model"""

    def __post_init__(self) -> None:
        unknown = set(self.author_kinds) - set(User.Kind.values)
        if unknown or not self.author_kinds:
            raise DataError(
                f"author_kinds {sorted(unknown) or '(none)'}: choose from {', '.join(User.Kind)}"
            )


def judgements(project: Project, chosen: Filter) -> "QuerySet[Response]":
    """The judgements in force that the filter lets through."""
    found = Response.objects.filter(
        project=project, in_force=True, author_kind__in=chosen.author_kinds
    ).exclude(kind__in=["flag", "skip"])
    found = found.filter(item__prompt__held_out=False, assignment__repeat=0)
    purposes = [Item.Purpose.TRAINING, *[Item.Purpose.COMPARISON] * chosen.comparisons]
    found = found.filter(item__purpose__in=purposes)
    if chosen.kinds:
        found = found.filter(kind__in=chosen.kinds)
    if chosen.users:
        found = found.filter(user__in=chosen.users)
    if chosen.up_to is not None:
        found = found.filter(pk__lte=chosen.up_to)
    return found


def freeze(project: Project, chosen: Filter, user: User | None) -> Snapshot:
    """Writes the snapshot, or returns the one that has the same content.

    Raises DataError if no judgement is left.
    """
    folder = Path(settings.FEEDBACK_DIR) / "snapshots"
    digest, ids = hashlib.sha256(), []
    authors: Counter[str] = Counter()
    names: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    held_back = 0
    # Written under another name first: the name is the hash of the content.
    written = folder / f".writing-{uuid.uuid4().hex}.jsonl"
    with atomic_file(written) as file:
        for response in records.in_force(judgements(project, chosen)):
            if chosen.hold_back and in_reserve(response.item.prompt_id, project_seed=project.pk):
                held_back += 1
                continue
            row = records.record(response).to_json()
            line = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode()
            file.write(line)
            digest.update(line)
            ids.append(response.pk)
            authors[response.author_kind] += 1
            names[response.user.username] += 1
            kinds[response.kind] += 1
    if not ids:
        written.unlink()
        if held_back:
            raise DataError(
                f"all {held_back} judgements are of prompts that are held back; judge more, or "
                "hold none back"
            )
        raise DataError(
            "there is nothing to train on: no judgement in force of the kinds "
            f"{', '.join(chosen.kinds) or 'any'} by {', '.join(chosen.author_kinds)}"
        )
    path = folder / f"{digest.hexdigest()}.jsonl"
    written.replace(path)
    counts = {"author_kind": dict(authors), "kind": dict(kinds), "author": dict(names)}
    if held_back:
        counts["held_back"] = {"judgements": held_back}
    return _store(project, path, ids, chosen, counts, user)


@transaction.atomic
def _store(
    project: Project,
    path: Path,
    ids: Sequence[int],
    chosen: Filter,
    counts: dict[str, dict[str, int]],
    user: User | None,
) -> Snapshot:
    snapshot, new = Snapshot.objects.get_or_create(
        project=project,
        digest=path.stem,
        defaults={
            "path": str(path),
            "judgements": len(ids),
            "filters": asdict(chosen),
            "counts": counts,
            "created_by": user,
        },
    )
    if new:
        _link(snapshot, ids)
    return snapshot


def _link(snapshot: Snapshot, ids: Iterable[int]) -> None:
    rows = (SnapshotJudgement(snapshot=snapshot, response_id=pk) for pk in ids)
    SnapshotJudgement.objects.bulk_create(rows, batch_size=BATCH)
