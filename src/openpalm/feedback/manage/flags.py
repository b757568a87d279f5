"""Flags that labelers set on items, until a manager has resolved them."""

from django.db.models import QuerySet

from openpalm.feedback.models import Project, Response


def open_flags(project: Project) -> "QuerySet[Response]":
    """A flag is in force until it is resolved or its author judges the item after all."""
    flagged = Response.objects.filter(project=project, state=Response.State.FLAGGED)
    # Not filter(in_force=True): SQLite would then read all judgements in force by their index.
    return flagged.exclude(in_force=False).order_by("-id")
