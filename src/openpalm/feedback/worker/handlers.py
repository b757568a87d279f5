"""Which function runs a job of each kind: run(job, progress) -> result.

They are imported when the first job of their kind is taken.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from openpalm.feedback.models import Job
from openpalm.feedback.worker.progress import Progress

Handler = Callable[[Job, Progress], dict[str, Any] | None]

HANDLERS = {
    "generate": "openpalm.feedback.training.generation:run",
    "select": "openpalm.feedback.training.selection:run",
    "statistics": "openpalm.feedback.quality.job:run",
    "train": "openpalm.feedback.training.runs:run",
    "score": "openpalm.feedback.training.scoring:run",
    "compare": "openpalm.feedback.training.comparisons:run",
    "promote": "openpalm.feedback.training.promotion:run",
    "import": "openpalm.feedback.imports.importer:run",
}

STATISTICS_DUE = "openpalm.feedback.quality.job:enqueue_due"
LEFT_OVER = "openpalm.feedback.training.runs:end_left_over"


def handler(kind: str) -> Handler:
    return _function(HANDLERS[kind])


def enqueue_due_statistics() -> int:
    """Adds the jobs of figures that are due; returns how many."""
    return _function(STATISTICS_DUE)()


def end_left_over() -> int:
    """Ends processes of trainings that nobody ended; returns how many."""
    return _function(LEFT_OVER)()


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
