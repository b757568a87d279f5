"""Freezes judgements: a .jsonl of preference records, named by the hash of its content.

A snapshot fixes what a model was trained on, down to each judgement, however they change later.
"""

import hashlib
import json
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from django.conf import settings
from django.db import transaction
from django.db.models import Max, QuerySet

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
from openpalm.feedback.worker.progress import Writing

BATCH = 500
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


def default_filter(project: Project, verb: str) -> Filter:
    """The judgements of those who decide in this project.

    A reward model is measured on the random arm, so its training holds that arm's prompts back.
    """
    return Filter((project.decided_by,), hold_back=verb == "reward")


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


class _Content:
    """The rows of a snapshot, counted while they are written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.ids: list[int] = []
        self.held_back = 0
        self._counts = {name: Counter[str]() for name in ("author_kind", "kind", "author")}

    def lines(self, project: Project, chosen: Filter) -> Iterator[bytes]:
        for response in records.in_force(judgements(project, chosen)):
            if chosen.hold_back and in_reserve(response.item.prompt_id, project_seed=project.pk):
                self.held_back += 1
                continue
            row = records.record(response).to_json()
            line = (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode()
            self.digest.update(line)
            self.ids.append(response.pk)
            values = response.author_kind, response.kind, response.user.username
            for counter, value in zip(self._counts.values(), values, strict=True):
                counter[value] += 1
            yield line

    def counts(self) -> dict[str, dict[str, int]]:
        held_back = {"held_back": {"judgements": self.held_back}} if self.held_back else {}
        return {name: dict(counter) for name, counter in self._counts.items()} | held_back

    def refusal(self, chosen: Filter) -> DataError:
        """Why a snapshot without rows is not made."""
        if self.held_back:
            return DataError(
                f"all {self.held_back} judgements are of prompts that are held back; judge more, "
                "or hold none back"
            )
        return DataError(
            "there is nothing to train on: no judgement in force of the kinds "
            f"{', '.join(chosen.kinds) or 'any'} by {', '.join(chosen.author_kinds)}"
        )


def freeze(
    project: Project,
    chosen: Filter,
    user: User | None,
    writing: Writing = transaction.atomic,
) -> Snapshot:
    """Writes the snapshot, or returns the one that has the same content.

    Raises DataError if no judgement is left.
    """
    folder = Path(settings.FEEDBACK_DIR) / "snapshots"
    content = _Content()
    # Written under another name first: the name is the hash of the content.
    written = folder / f".writing-{uuid.uuid4().hex}.jsonl"
    with atomic_file(written) as file:
        for line in content.lines(project, chosen):
            file.write(line)
    if not content.ids:
        written.unlink()
        raise content.refusal(chosen)
    path = folder / f"{content.digest.hexdigest()}.jsonl"
    written.replace(path)
    with writing():
        snapshot = _store(project, path, content, chosen, user)
    _link(snapshot, content.ids, writing)
    return snapshot


def _store(
    project: Project, path: Path, content: _Content, chosen: Filter, user: User | None
) -> Snapshot:
    snapshot, _ = Snapshot.objects.get_or_create(
        project=project,
        digest=path.stem,
        defaults={
            "path": str(path),
            "judgements": len(content.ids),
            "filters": asdict(chosen),
            "counts": content.counts(),
            "created_by": user,
        },
    )
    return snapshot


def _link(snapshot: Snapshot, ids: Sequence[int], writing: Writing) -> None:
    """Stores the rows of the lineage, BATCH in a transaction: on SQLite nobody judges during one.

    Continues where a worker was killed; nothing is trained on a snapshot before it is whole.
    """
    last = snapshot.rows.aggregate(last=Max("response"))["last"] or 0
    missing = ids[bisect_right(ids, last) :]
    for start in range(0, len(missing), BATCH):
        with writing():
            SnapshotJudgement.objects.bulk_create(
                (
                    SnapshotJudgement(snapshot=snapshot, response_id=pk)
                    for pk in missing[start : start + BATCH]
                ),
                ignore_conflicts=True,
            )
