"""The queue of jobs in the database."""

from typing import Any

from openpalm.feedback.models import Job, Project, User

KINDS = (
    "generate",  # candidates of prompts, from model servers
    "select",  # the next batch of items
    "statistics",  # all figures of a project
    "train",  # a TrainRun
    "score",  # candidates with a reward model
    "compare",  # the pairs of a Comparison
    "promote",  # a Promotion, or its undoing
    "import",  # an uploaded file
)


def enqueue(
    kind: str, *, project: Project | None = None, user: User | None = None, **arguments: Any
) -> Job:
    """Adds a job. The worker runs jobs of one project in order."""
    if kind not in KINDS:
        raise ValueError(f"{kind}: there is no such kind of job")
    return Job.objects.create(kind=kind, project=project, created_by=user, arguments=arguments)
