"""Scores candidates by `openpalm score` in a process of its own.

A reward model gives rewards; a model that answers gives its log-probability of the candidate.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Exists, OuterRef, QuerySet

from openpalm.base import jsonl
from openpalm.errors import DataError, WorkError
from openpalm.feedback.accounts import audit
from openpalm.feedback.models import Candidate, Job, ModelScore, ModelVersion, User
from openpalm.feedback.training.registry import REWARD
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.processes import Command
from openpalm.feedback.worker.progress import Progress

BATCH = 2000


def start(model: ModelVersion, user: User | None) -> Job:
    """Queues the scoring of all answers by a reward model. Raises DataError."""
    if model.kind != REWARD or not model.path:
        raise DataError("only a reward model with a checkpoint scores")
    job = jobs.enqueue("score", project=model.project, user=user, model=model.pk)
    audit.record("job.score", user=user, project=model.project, target=model, job=job.pk)
    return job


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "score": candidates of the model's project that have no score of it yet."""
    model = ModelVersion.objects.select_related("project").get(pk=job.arguments["model"])
    result = score(model, progress)
    with progress.writing():
        jobs.enqueue_once("statistics", project=model.project)
    return result


def score(model: ModelVersion, progress: Progress) -> dict[str, Any]:
    """Counts of the candidates that were scored and of those too long for the model."""
    if not model.path:
        raise DataError(f"the model {model} has no checkpoint to score with")
    waiting = _unscored(model)
    if not waiting.exists():
        return {"scored": 0, "too_long": 0}
    folder = Path(settings.FEEDBACK_DIR) / "scores"
    # Names of this attempt: a worker that was taken for dead may still write files of its own.
    name = f"{model.pk}-{progress.job.pk}-{progress.job.lease}"
    for old in folder.glob(f"{model.pk}-{progress.job.pk}-*.jsonl"):
        old.unlink(missing_ok=True)
    given, found = folder / f"{name}-given.jsonl", folder / f"{name}-scored.jsonl"
    try:
        return _score(model, waiting, given, found, progress)
    finally:
        given.unlink(missing_ok=True)
        found.unlink(missing_ok=True)


def _score(
    model: ModelVersion,
    waiting: "QuerySet[Candidate]",
    given: Path,
    found: Path,
    progress: Progress,
) -> dict[str, Any]:
    total = jsonl.write_rows(given, map(_row, waiting.iterator(chunk_size=BATCH)))
    progress.start(total, f"scoring with {model}")
    words = ["score", model.path, "--data", str(given), "--out", str(found)]
    command = Command(words, given.with_name(f"{model.pk}.log"), dies_with_us=True)
    if status := command.run(check=progress.check):
        raise WorkError(command.failure(status))
    scored = _store(model, found, progress)
    return {"scored": scored, "too_long": total - scored}


def _unscored(model: ModelVersion) -> "QuerySet[Candidate]":
    has = ModelScore.objects.filter(model=model, candidate=OuterRef("pk"))
    found = Candidate.objects.filter(prompt__project=model.project_id).filter(~Exists(has))
    return found.select_related("prompt").order_by("id")


def _row(candidate: Candidate) -> dict[str, Any]:
    return {"id": candidate.pk, "prompt": candidate.prompt.messages, "completion": candidate.text}


def _store(model: ModelVersion, path: Path, progress: Progress) -> int:
    """Rows that an earlier attempt stored are left as they are."""
    field = "reward" if model.kind == REWARD else "log_prob"
    scores = (row for row in jsonl.read_rows(path) if row.get(field) is not None)
    rows = (ModelScore(model=model, candidate_id=row["id"], score=row[field]) for row in scores)
    stored = 0
    while batch := list(islice(rows, BATCH)):
        with progress.writing():
            ModelScore.objects.bulk_create(batch, ignore_conflicts=True)
        stored += len(batch)
        progress.advance(len(batch))
    return stored
