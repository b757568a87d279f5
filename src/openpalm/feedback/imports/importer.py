"""The import job: adds the prompts or items of an uploaded file to a project.

Memory does not grow with the file. Rows that the project has already are counted and skipped, so
an interrupted job simply runs again. Unusable rows are counted by reason, with
file and line of the first of each.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from django.db import transaction

from openpalm.data.rows.read_result import StreamCounts
from openpalm.errors import DataError, count_of
from openpalm.feedback.imports import upload_rows, uploads
from openpalm.feedback.imports.upload_rows import UploadedItem
from openpalm.feedback.items.model_names import names_itself, names_of
from openpalm.feedback.items.new_items import (
    NewCandidate,
    NewItem,
    add_items,
    add_split_prompts,
    known_digests,
    prompt_digest,
)
from openpalm.feedback.items.tasks import KINDS, candidates_needed
from openpalm.feedback.judgements.payloads import axes
from openpalm.feedback.models import Item, Job, ModelVersion, Project, Prompt, Task
from openpalm.feedback.worker.progress import Progress, Writing

BATCH = 200
ALREADY = "already in the project"
HELD_OUT = "its prompt is held out for comparisons"
Found = tuple[str, UploadedItem]


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """Arguments: file (in uploads/), name, what (prompts | items), held_out, needed, gold."""
    assert job.project is not None
    path = uploads.path_of(job.arguments["file"])
    if not path.exists():
        if job.result:  # the worker ended between the last two writes
            return job.result
        raise DataError(f"{job.arguments['name']}: the uploaded file is gone; upload it again")
    importer = Importer(
        job.project, path, job.arguments, since=job.started_at, writing=progress.writing
    )
    progress.start(0, f"reads {job.arguments['name']}")
    try:
        for rows in importer.run():
            progress.move_to(rows)
    except DataError as error:
        progress.confirm()  # otherwise another worker reads the file
        path.unlink(missing_ok=True)
        # Name the file as the person does, not by its path on the server.
        raise DataError(str(error).replace(str(path), job.arguments["name"])) from None
    result = importer.result()
    with progress.writing():
        progress.keep(result)
    path.unlink(missing_ok=True)
    return result


@dataclass
class Importer:
    """Adds a file to a project, BATCH rows at a time."""

    project: Project
    path: Path
    arguments: dict[str, Any]
    counts: StreamCounts = field(default_factory=StreamCounts)
    since: datetime | None = None
    """start of the job's first attempt: what was added since then is its own"""
    writing: Writing = transaction.atomic
    rows: int = 0
    held_out: int = 0

    def __post_init__(self) -> None:
        self.names = names_of(self.project)
        self.models = _models(self.project)
        self._kind = KINDS[self.project.task]
        self.what = self.arguments.get("what", "prompts")
        self.earlier = 0
        if self.since:
            own = {"project": self.project, "created_at__gte": self.since}
            if self.what == "items" or self.project.task == Task.DEMONSTRATION:
                self.earlier = Item.objects.filter(key__startswith="file:", **own).count()
            else:
                prompts = Prompt.objects.filter(source="file", **own)
                self.earlier = prompts.count()
                self.held_out = prompts.filter(held_out=True).count()

    def run(self) -> Iterator[int]:
        """Yields the number of rows read so far."""
        name = self.arguments["name"]
        read = upload_rows.read_items if self.what == "items" else upload_rows.read_prompts
        add = self._add_items if self.what == "items" else self._add_prompts
        found = read(self.path, name)
        while batch := list(islice(found, BATCH)):
            self.rows += len(batch)
            with self.writing():
                add(list(self._usable(batch)))
            yield self.rows
        if not self.rows:
            raise DataError(f"{name}: holds no row; nothing was added")
        self._count_earlier()

    def _count_earlier(self) -> None:
        """Counts as added what an earlier attempt of this job added."""
        again = min(self.earlier, self.counts.unused[ALREADY])
        self.counts.used += again
        self.counts.unused[ALREADY] -= again
        self.counts.unused += Counter()  # without reasons that no row has

    def result(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "added": self.counts.used,
            "held_out": self.held_out,
            "unused": dict(self.counts.unused),
            "lines": self.counts.report(),
        }

    def _usable(self, batch: Iterable[tuple[str, UploadedItem | str]]) -> Iterator[Found]:
        for where, row in batch:
            if isinstance(row, str):
                self.counts.leave_out(where, row)
            else:
                yield where, row

    # Prompts.

    def _add_prompts(self, found: list[Found]) -> None:
        if self.project.task == Task.DEMONSTRATION:
            self._add_items(found)
            return
        share = float(self.arguments.get("held_out") or 0.0)
        fresh = self._new_prompts(found)
        self.held_out += add_split_prompts(self.project, fresh, "file", share)
        self.counts.used += len(fresh)

    def _new_prompts(self, found: list[Found]) -> dict[str, list[dict[str, str]]]:
        messages = {where: _plain(row) for where, row in found}
        digests = {where: prompt_digest(m) for where, m in messages.items()}
        seen = known_digests(self.project, digests.values())
        fresh: dict[str, list[dict[str, str]]] = {}
        for where, digest in digests.items():
            if digest in seen:
                self.counts.leave_out(where, ALREADY)
            else:
                seen.add(digest)
                fresh[digest] = messages[where]
        return fresh

    # Items.

    def _add_items(self, found: list[Found]) -> None:
        new = {}
        held_out = self._held_out(found)
        for where, row in found:
            if where in held_out:
                self.counts.leave_out(where, HELD_OUT)
                continue
            for item in self._items_of(where, row):
                if item.key in new:
                    self.counts.leave_out(where, ALREADY)
                else:
                    new[item.key] = (where, item)
        made = add_items(self.project, [item for _, item in new.values()])
        for (where, _), (_, is_new) in zip(new.values(), made, strict=True):
            if is_new:
                self.counts.used += 1
            else:
                self.counts.leave_out(where, ALREADY)

    def _held_out(self, found: list[Found]) -> set[str]:
        digests = {where: prompt_digest(_plain(row)) for where, row in found}
        held = known_digests(self.project, digests.values(), held_out=True)
        return {where for where, digest in digests.items() if digest in held}

    def _items_of(self, where: str, row: UploadedItem) -> Iterator[NewItem]:
        least, most = candidates_needed(self.project.task)
        count = len(row.candidates)
        if most == 1 and count > 1:  # each answer is an item of its own
            for candidate in row.candidates:
                yield self._item(row, (candidate,), None)
            self._note(where, row, None)
        elif count < least:
            needs = "an answer" if least == 1 else f"{least} answers"
            keys = "" if count else " (as `responses`, or as `chosen` and `rejected`, for example)"
            found = f"has {count_of(count, 'answer')}"
            self.counts.leave_out(where, f"{found}; this project needs {needs}{keys}")
        elif most and count > most:
            self.counts.leave_out(where, f"has {count} answers; this project compares {most}")
        elif least > 1 and len({text.strip() for text, _ in row.candidates}) < count:
            self.counts.leave_out(where, "equal answers")
        elif any(not text.strip() for text, _ in row.candidates):
            self.counts.leave_out(where, "an empty answer")
        else:
            gold = self._gold(row)
            self._note(where, row, gold)
            yield self._item(row, row.candidates if most else (), gold)

    def _gold(self, row: UploadedItem) -> dict[str, Any] | None:
        """The file's judgement as the expected answer, if that was asked for and fits the task.

        None if the judgements of several people differ.
        """
        if not self.arguments.get("gold"):
            return None
        asked = set(axes(self.project))  # a rating on other axes equals nobody's
        fitting = [
            payload
            for kind, payload in row.judgements
            if kind == self._kind and set(payload.get("ratings", asked)) == asked
        ]
        return fitting[0] if fitting and fitting.count(fitting[0]) == len(fitting) else None

    def _note(self, where: str, row: UploadedItem, gold: dict[str, Any] | None) -> None:
        """Counts the parts of a used row that are ignored."""
        notes = list(row.notes)
        left = sum(judgement != (self._kind, gold) for judgement in row.judgements)
        if left:
            notes.append("without its judgement" if left == 1 else "without its judgements")
        if row.candidates and not candidates_needed(self.project.task)[1]:
            notes.append("without its answers, since people write them here")
        for note in notes:
            self.counts.alter(where, note)

    def _item(
        self,
        row: UploadedItem,
        candidates: tuple[tuple[str, str], ...],
        gold: dict[str, Any] | None,
    ) -> NewItem:
        messages = _plain(row)
        return NewItem(
            messages=messages,
            candidates=tuple(self._candidate(text, model) for text, model in candidates),
            source="file",
            key=_key(prompt_digest(messages), [text for text, _ in candidates]),
            purpose=Item.Purpose.TRAINING if gold is None else Item.Purpose.GOLD,
            needed=self.arguments.get("needed"),
            gold=gold,
            gold_kind=self._kind if gold else "",
        )

    def _candidate(self, text: str, model: str) -> NewCandidate:
        return NewCandidate(
            text=text,
            checkpoint=model[:200],
            model=self.models.get(model) if model else None,
            names_itself=names_itself(text, self.names),
        )


def _plain(row: UploadedItem) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in row.prompt]


def _key(digest: str, texts: list[str]) -> str:
    content = "\0".join([digest, *texts]).encode("utf-8", "surrogatepass")
    return f"file:{hashlib.sha256(content).hexdigest()}"


def _models(project: Project) -> dict[str, ModelVersion]:
    found = ModelVersion.objects.filter(project=project)
    return {name: model for model in found for name in (model.name, model.checkpoint) if name}
